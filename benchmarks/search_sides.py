"""The sides that benchmarks/search.py compares: the engine, the published way, and plain batched generation."""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
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
from drllm.questions.prompts import Prompt, wants_chat_template
from drllm.questions.sets import expand_sets, load_questions
from drllm.rollouts.engine import RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from drllm.rollouts.rewards import reward_named
from drllm.search.pool import SearchedQuestion, SearchPool
from drllm.search.selection import seeded_order
from drllm.search.tree import PathSearch, SearchResult, SearchSettings, question_seed
from train_models.paths import Path, path_to_layer_indices


def load(args: argparse.Namespace) -> tuple[Any, Any, torch.device]:
    """(model, tokenizer, device): the checkpoint of --model, or random weights of --shape with its tokenizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = provenance.parse_dtype(args.dtype)
    tokenizer = load_tokenizer(args.model)
    if args.shape is None:
        with loading(args.model, "model"):
            model = load_path_model(args.model, dtype=dtype)
        return model.to(device), tokenizer, device
    torch.manual_seed(args.seed)
    with torch.device(device):
        config = SHAPES[args.shape]
        model = path_model_class(config.model_type)._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.requires_grad_(False).eval(), tokenizer, device


def load_prompts(args: argparse.Namespace, tokenizer: Any, count: int) -> list[Prompt] | list[LikelihoodPrompt]:
    """`count` training questions, as evenly from the sets as they allow, in seeded order."""
    if reward_named(args.reward).generates:
        chat, _ = wants_chat_template("auto", args.model, tokenizer, tokenizer.eos_token_id)
        prompt_of = functools.partial(Prompt.of, tokenizer=tokenizer, chat=chat)
    else:
        prompt_of = functools.partial(LikelihoodPrompt.of, tokenizer=tokenizer)
    sets = expand_sets(args.dataset)
    orders = [seeded_order(load_questions(name, "train", args.data_dir), args.seed) for name in sets]
    in_turn = (question for turn in itertools.zip_longest(*orders) for question in turn if question is not None)
    return [prompt_of(question) for question in itertools.islice(in_turn, count)]


def make_engine(args: argparse.Namespace, model: Any, tokenizer: Any, **options: Any) -> Any:
    """The engine of --reward."""
    kind = RolloutEngine if reward_named(args.reward).generates else LikelihoodEngine
    return kind(model, tokenizer, args.batch_size, **options)


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


@kernels_without_plans()  # every side of a ratio has the same
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


@kernels_without_plans()  # every side of a ratio has the same
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


@kernels_without_plans()  # every side of a ratio has the same
@torch.inference_mode()
def plain_generation(model: Any, tokenizer: Any, prompts: list[Prompt], batch_size: int) -> None:
    """The ceiling: stock `generate` on the default path, in full batches of similar lengths and equal limits."""
    ordered = sorted(prompts, key=lambda prompt: (prompt.max_new_tokens, len(prompt.input_ids)))
    for limit, group in itertools.groupby(ordered, key=lambda prompt: prompt.max_new_tokens):
        rest = list(group)
        while batch := rest[:batch_size]:
            rest = rest[batch_size:]
            width = len(batch[-1].input_ids)
            pad = tokenizer.pad_token_id or 0
            ids = torch.tensor([[pad] * (width - len(prompt.input_ids)) + list(prompt.input_ids) for prompt in batch])
            mask = (torch.arange(width) >= torch.tensor([[width - len(prompt.input_ids)] for prompt in batch])).long()
            model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=pad,
            )


class EngineProcesses:
    """Processes of one thread that run engine and plain generation on their shares of the questions, when told to.

    This is how `accelerate launch --num_processes N data_generation.py` uses N cores.
    """

    def __init__(self, count: int, args: argparse.Namespace) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, count, args, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, task: str) -> list[dict[str, Any]]:
        """Runs "search" or "plain" in all processes at once; what each returned, with its own "seconds"."""
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
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    model, tokenizer, device = load(args)
    prompts = load_prompts(args, tokenizer, args.questions)[rank::count]
    settings = SearchSettings(num_simulations=args.num_simulations)
    while (task := pipe.recv()) != "end":
        result: dict[str, Any] = {}
        with Stopwatch(device) as watch:
            if task == "search":
                engine = make_engine(args, model, tokenizer)
                batched, simulations = search_batched(engine, prompts, settings, args.seed, args.concurrency)
                result = {"batched": batched, "simulations": simulations, "rollouts": engine.rollouts}
                if grader := getattr(engine, "grader", None):
                    result["grading"] = {name: getattr(grader, name) for name in ("graded", "seconds", "waited")}
            else:
                plain_generation(model, tokenizer, prompts, args.batch_size)
        pipe.send(result | {"seconds": watch.seconds, "questions": len(prompts)})
