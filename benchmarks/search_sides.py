"""The sides that benchmarks/search.py compares: the engine, the published way, and plain batched generation."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch

from benchmarks.shapes import SHAPES
from data_models import load_path_model, path_model_class
from drllm import provenance
from drllm.attention import kernels_without_plans
from drllm.checkpoints import load_tokenizer
from drllm.loading import loading
from drllm.questions.grading import grade
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.padding import pad_ids
from drllm.questions.prompts import Prompt, wants_chat_template
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import SETS, Question, expand_sets, load_questions
from drllm.rollouts.batches import OPEN_BATCHES, BatchLimit, limit_on, run_in_batches
from drllm.rollouts.engine import RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from drllm.rollouts.rewards import reward_named
from drllm.search.pool import SearchedQuestion, SearchPool
from drllm.search.selection import seeded_order
from drllm.search.tree import PathSearch, SearchResult, SearchSettings, question_seed
from train_models.paths import Path, path_to_layer_indices

LENGTHS = FilePath(__file__).with_name("prompt_lengths.json")
DEFAULT_QUESTIONS = 112


class Speller:
    """Stands in for the tokenizer of random weights: spells any tokens as an answer to a mathematical question.

    One answer in eight is an expression that only a helper process can compare, which is the share among 899 pairs of
    answers of DART level 3.
    """

    eos_token_id = None
    pad_token_id = 0

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        number = sum(place * int(token) for place, token in enumerate(tokens, start=1))
        return str(number) if number % 8 else rf"\sqrt{{{number}}}+\frac{{1}}{{{number + 1}}}"


def load(args: argparse.Namespace) -> tuple[Any, Any, torch.device]:
    """(model, tokenizer, device): the checkpoint of --model, or random weights of --shape."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = provenance.parse_dtype(args.dtype)
    if args.shape is None:
        tokenizer = load_tokenizer(args.model)
        with loading(args.model, "model"):
            model = load_path_model(args.model, dtype=dtype)
        return model.to(device), tokenizer, device
    torch.manual_seed(args.seed)
    with torch.device(device):
        config = SHAPES[args.shape]
        model = path_model_class(config.model_type)._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False).eval(), Speller(), device


def load_prompts(args: argparse.Namespace, tokenizer: Any, count: int) -> list[Prompt] | list[LikelihoodPrompt]:
    """`count` training questions, as evenly from the sets as they allow, in seeded order."""
    sets = expand_sets(args.dataset)
    if args.shape is not None:
        return random_prompts(sets, SHAPES[args.shape].vocab_size, count, args.seed)
    if reward_named(args.reward).generates:
        chat, _ = wants_chat_template("auto", args.model, tokenizer, tokenizer.eos_token_id)
        prompt_of = functools.partial(Prompt.of, tokenizer=tokenizer, chat=chat)
    else:
        prompt_of = functools.partial(LikelihoodPrompt.of, tokenizer=tokenizer)
    orders = [seeded_order(load_questions(name, "train", args.data_dir), args.seed) for name in sets]
    in_turn = (question for turn in itertools.zip_longest(*orders) for question in turn if question is not None)
    return [prompt_of(question) for question in itertools.islice(in_turn, count)]


def random_prompts(sets: Sequence[str], vocabulary: int, count: int, seed: int) -> list[Prompt]:
    """`count` prompts of random tokens, as long as those of ARC and DART; their lengths repeat.

    Lengths are those of 250 training questions per set under the tokenizer and chat template of SmolLM2-135M-Instruct.
    """
    lengths, choose, prompts = json.loads(LENGTHS.read_text()), random.Random(seed), []
    for number in range(count):
        name = sets[number % len(sets)]
        of_set = lengths[name]
        labels = tuple("ABCD") if SETS[name].kind == "choice" else ()
        answer = choose.choice(labels) if labels else rf"\frac{{{choose.randrange(1, 99)}}}{{7}}"
        question = Question(name, f"{name}-{number}", "", labels, labels, answer)
        ids = tuple(choose.choices(range(vocabulary), k=of_set[number // len(sets) % len(of_set)][0]))
        prompts.append(Prompt(question, "", ids, ResponseFormat().limit(name, chat=True)))
    return prompts


def limit_of(args: argparse.Namespace, model: Any, prompts: Sequence[Any]) -> BatchLimit:
    """The batches of --batch_size."""
    size = reward_named(args.reward).size
    return limit_on(model, [size(prompt) for prompt in prompts], args.batch_size)


def make_engine(args: argparse.Namespace, model: Any, tokenizer: Any, limit: BatchLimit, **options: Any) -> Any:
    """The engine of --reward, with a limit of its own."""
    kind = RolloutEngine if reward_named(args.reward).generates else LikelihoodEngine
    return kind(model, tokenizer, replace(limit), **options)


class Stopwatch:
    """Seconds of a `with` block, measured after the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Stopwatch:
        self._wait()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self.started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def search_batched(
    engine: Any, prompts: Sequence[Any], settings: SearchSettings, seed: int, concurrency: int
) -> tuple[dict[str, SearchedQuestion], int]:
    """All questions with the engine: (searched questions by id, simulations)."""
    pool = SearchPool(engine, settings, seed, concurrency)
    return {searched.prompt.question.id: searched for searched in pool.search(prompts)}, pool.simulations


def search_published(
    respond: Callable[[Any, Path], tuple[str, bool]],
    num_blocks: int,
    prompts: Iterable[Any],
    settings: SearchSettings,
    seed: int,
) -> tuple[dict[str, tuple[SearchResult, dict[Path, str]]], int]:
    """The published way, one rollout at a time: (results and responses by question id, simulations).

    Args:
        respond: (prompt, path) -> (response, whether it is right): `generate_one` or `score_options`.
    """
    results: dict[str, tuple[SearchResult, dict[Path, str]]] = {}
    for prompt in prompts:
        search = PathSearch(num_blocks, settings, question_seed(seed, prompt.question.id))
        responses: dict[Path, str] = {}
        while (path := search.request) is not None:
            responses[path], is_right = respond(prompt, path)
            search.tell(float(is_right))
        results[prompt.question.id] = search.result(), responses
    return results, sum(result.simulations for result, _ in results.values())


@torch.inference_mode()
def generate_one(model: Any, tokenizer: Any, prompt: Prompt, path: Path) -> tuple[str, bool]:
    """One response with stock `generate`, and whether it is right."""
    ids = torch.tensor([prompt.input_ids], device=model.device)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        layer_indices=path_to_layer_indices(path),
        max_new_tokens=prompt.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    response = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    return response, grade(prompt.question, response)


@torch.inference_mode()
def score_options(model: Any, tokenizer: Any, prompt: LikelihoodPrompt, path: Path) -> tuple[str, bool]:
    """The label of the most likely option and whether it is right, with one forward pass per option, as lm-eval's `hf`
    does at batch size 1."""
    scores = []
    for row, scored in zip(prompt.rows, prompt.scored, strict=True):
        ids = torch.tensor([row[:-1]], device=model.device)
        logits = model(ids, layer_indices=path_to_layer_indices(path), use_cache=False).logits[0, -scored:]
        targets = torch.tensor(row[-scored:], device=model.device)
        scores.append(logits.float().log_softmax(-1).gather(1, targets[:, None]).double().sum().item())
    chosen = prompt.question.labels[max(range(len(scores)), key=scores.__getitem__)]
    return chosen, prompt.is_right(scores, normalised=False)


def same_results(
    batched: dict[str, SearchedQuestion], published: dict[str, tuple[SearchResult, dict[Path, str]]]
) -> int:
    """How many questions have equal results and responses; the engine may end a response once its grade is settled."""
    same = 0
    for question_id, (result, responses) in published.items():
        searched = batched[question_id]
        same += (
            searched.result == result
            and searched.base_response == responses[(1,) * len(next(iter(responses)))]
            and (searched.path_response is None or responses[result.best_path].startswith(searched.path_response))
        )
    return same


@torch.inference_mode()
def plain_generation(model: Any, tokenizer: Any, prompts: list[Prompt], limit: BatchLimit) -> None:
    """The ceiling: stock `generate` on the default path, in batches like the engine's, of equal limits."""

    def run(batch: list[Prompt]) -> None:
        model.generate(
            **pad_ids([prompt.input_ids for prompt in batch], tokenizer.pad_token_id or 0, model.device),
            max_new_tokens=batch[0].max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )

    for most in sorted({prompt.max_new_tokens for prompt in prompts}):
        of_limit = [prompt for prompt in prompts if prompt.max_new_tokens == most]
        run_in_batches(of_limit, lambda prompt: prompt.total_tokens, limit, run, lambda batch: False)


class Side:
    """One process's share of the questions, and what runs on it: the engine's search, or plain generation."""

    def __init__(self, args: argparse.Namespace, rank: int = 0, count: int = 1, loaded: tuple | None = None) -> None:
        self.args = args
        self.model, self.tokenizer, self.device = loaded or load(args)
        some = load_prompts(args, self.tokenizer, args.questions or DEFAULT_QUESTIONS)
        self.limit = limit_of(args, self.model, some)
        # On a GPU enough questions for full batches.
        count_all = args.questions or (
            DEFAULT_QUESTIONS if self.limit.tokens is None else OPEN_BATCHES * self.limit.rows
        )
        self.prompts = load_prompts(args, self.tokenizer, count_all)[rank::count]
        self.steps: Any = (
            None  # graphs of the first search, the warm-up: a search of hours captures in its first minute
        )

    def run(self, task: str) -> dict[str, Any]:
        """Runs "search", "plain" or "plain, as torch chooses" kernels; its "seconds" and what it did."""
        args, result = self.args, {"questions": len(self.prompts), "rows": self.limit.rows}
        with Stopwatch(self.device) as watch:
            if task == "search":
                engine = make_engine(args, self.model, self.tokenizer, self.limit)
                if self.steps is not None:
                    engine.steps = self.steps
                settings = SearchSettings(num_simulations=args.num_simulations)
                at_once = args.concurrency or OPEN_BATCHES * self.limit.rows
                batched, simulations = search_batched(engine, self.prompts, settings, args.seed, at_once)
                result |= {"batched": batched, "simulations": simulations, "rollouts": engine.rollouts}
                result |= {"block_tokens": engine.block_tokens}
                self.steps = getattr(engine, "steps", None)
                if self.steps is not None:
                    result |= {"captures": self.steps.captures, "captures_refused": self.steps.is_refused}
                if grader := getattr(engine, "grader", None):
                    result["grading"] = {name: getattr(grader, name) for name in ("graded", "seconds", "waited")}
            else:
                with kernels_without_plans() if task == "plain" else contextlib.nullcontext():
                    plain_generation(self.model, self.tokenizer, self.prompts, replace(self.limit))
        return result | {"seconds": watch.seconds}


class EngineProcesses:
    """Processes of one thread with a `Side` each, which run when told to: so `accelerate launch --num_processes N` uses
    N cores. One side runs in this process.
    """

    def __init__(self, count: int, args: argparse.Namespace, loaded: tuple) -> None:
        self.side = Side(args, loaded=loaded) if count == 1 else None
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count if count > 1 else 0):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, count, args, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, task: str) -> list[dict[str, Any]]:
        """Runs "search" or "plain" everywhere at once; what each returned, with its own "seconds"."""
        if self.side is not None:
            return [self.side.run(task)]
        for pipe in self.pipes:
            pipe.send(task)
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        """Ends the processes."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send("end")
            process.join()


def _serve(rank: int, count: int, args: argparse.Namespace, pipe: Any) -> None:
    """One process of `EngineProcesses`."""
    torch.set_num_threads(1)
    side = Side(args, rank, count)
    while (task := pipe.recv()) != "end":
        pipe.send(side.run(task))


def matrix_rate(model: Any, device: torch.device) -> float:
    """Operations per second of the product of two square matrices in the model's dtype, the best of ten."""
    size = 8192 if device.type == "cuda" else 512
    first, second = (torch.randn(size, size, device=device, dtype=model.dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        with Stopwatch(device) as watch:
            first @ second
        seconds.append(watch.seconds)
    return 2 * size**3 / min(seconds)
