"""How fast the search is, and what each of its policies finds.

    python benchmarks/search.py speed          # against the published way and against plain batched generation
    python benchmarks/search.py concurrency    # throughput for 1 to 256 questions at once, with a figure
    python benchmarks/search.py shortcuts      # what each exact shortcut is worth
    python benchmarks/search.py policies       # what each search policy finds in 50 simulations
    python benchmarks/search.py speed --shape llama-3.2-3b --dtype bfloat16   # random weights, on a GPU

Each prints its figures and writes them, with command, seed, versions, commit and runtime, to results/search_*.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import SHAPES  # noqa: E402
from data_models import load_path_model, path_model_class  # noqa: E402
from drllm import provenance  # noqa: E402
from drllm.errors import UserError, main_guard  # noqa: E402
from drllm.evaluation.experiment_figures import draw_search_concurrency  # noqa: E402
from drllm.questions.grading import grade  # noqa: E402
from drllm.questions.prompts import Prompt  # noqa: E402
from drllm.questions.sets import expand_sets, load_questions  # noqa: E402
from drllm.rollouts.engine import Request, RolloutEngine  # noqa: E402
from drllm.search.pool import SearchedQuestion, SearchPool  # noqa: E402
from drllm.search.selection import seeded_order  # noqa: E402
from drllm.search.tree import POLICIES, PathSearch, SearchResult, SearchSettings, question_seed  # noqa: E402
from train_models.paths import path_to_layer_indices  # noqa: E402


def load(args: argparse.Namespace) -> tuple[Any, Any, torch.device]:
    """(model, tokenizer, device): the checkpoint of --model, or random weights of --shape with its tokenizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = provenance.parse_dtype(args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.shape is None:
        return load_path_model(args.model, dtype=dtype).to(device), tokenizer, device
    torch.manual_seed(args.seed)
    with torch.device(device):
        config = SHAPES[args.shape]
        model = path_model_class(config.model_type)._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.requires_grad_(False).eval(), tokenizer, device


def load_prompts(args: argparse.Namespace, tokenizer: Any, count: int) -> list[Prompt]:
    """`count` training questions, as evenly from the sets as they allow, in seeded order."""
    sets = expand_sets(args.dataset)
    orders = [seeded_order(load_questions(name, "train", args.data_dir), args.seed) for name in sets]
    in_turn = (question for turn in itertools.zip_longest(*orders) for question in turn if question is not None)
    return [Prompt.of(question, tokenizer, chat=False) for question in itertools.islice(in_turn, count)]


class Stopwatch:
    """Seconds of a `with` block, after the device is done."""

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


def search_batched(engine: RolloutEngine, prompts: list[Prompt], settings: SearchSettings, seed: int, concurrency: int):
    """All questions with the engine: (searched questions by id, simulations)."""
    pool = SearchPool(engine, settings, seed, concurrency)
    return {one.prompt.question.id: one for one in pool.search(prompts)}, pool.simulations


@torch.inference_mode()
def search_published(model: Any, tokenizer: Any, prompts: Iterable[Prompt], settings: SearchSettings, seed: int):
    """The published way: one rollout at a time with stock `generate`. (results by id, simulations)."""
    results: dict[str, tuple[SearchResult, dict]] = {}
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids], device=model.device)
        search = PathSearch(model.config.num_hidden_layers, settings, question_seed(seed, prompt.question.id))
        responses = {}
        while (path := search.request) is not None:
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                layer_indices=path_to_layer_indices(path),
                max_new_tokens=prompt.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            responses[path] = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
            search.tell(float(grade(prompt.question, responses[path])))
        results[prompt.question.id] = search.result(), responses
    return results, sum(result.simulations for result, _ in results.values())


def same_labels(batched: dict[str, SearchedQuestion], published: dict[str, tuple[SearchResult, dict]]) -> int:
    """How many questions have the same result and responses; the engine may end a response once it is settled."""
    same = 0
    for question_id, (result, responses) in published.items():
        one = batched[question_id]
        same += (
            one.result == result
            and one.base_response == responses[(1,) * len(next(iter(responses)))]
            and (one.path_response is None or responses[result.best_path].startswith(one.path_response))
        )
    return same


@torch.inference_mode()
def plain_generation(model: Any, tokenizer: Any, prompts: list[Prompt], batch_size: int) -> None:
    """The ceiling: stock `generate` on the default path, full batches of neighbouring lengths and equal limits."""
    ordered = sorted(prompts, key=lambda prompt: (prompt.max_new_tokens, len(prompt.input_ids)))
    for limit, group in itertools.groupby(ordered, key=lambda prompt: prompt.max_new_tokens):
        rest = list(group)
        while batch := rest[:batch_size]:
            rest = rest[batch_size:]
            width = len(batch[-1].input_ids)
            pad = tokenizer.pad_token_id or 0
            ids = torch.tensor([[pad] * (width - len(one.input_ids)) + list(one.input_ids) for one in batch])
            mask = torch.tensor([[0] * (width - len(one.input_ids)) + [1] * len(one.input_ids) for one in batch])
            model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=pad,
            )


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """The engine against the published way (same questions, seeds and rewards) and against plain generation.

    The engine and plain generation use the cores as `accelerate launch --num_processes N data_generation.py` does: one
    process a core, each with its share of the questions. The published way has all cores for its one rollout.
    """
    settings = SearchSettings(num_simulations=args.num_simulations)
    batched, simulations, rollouts, seconds, plain_rate = _in_processes(args, settings)
    model, tokenizer, device = load(args)
    asked = load_prompts(args, tokenizer, args.questions)[: args.published_questions]
    search_published(model, tokenizer, asked[:2], SearchSettings(num_simulations=2), 0)  # warm up
    with Stopwatch(device) as watch:
        published, published_simulations = search_published(model, tokenizer, asked, settings, args.seed)
    published_rate, engine_rate, rollout_rate = (
        published_simulations / watch.seconds,
        simulations / seconds,
        rollouts / seconds,
    )
    same = same_labels(batched, published)
    print(f"published way, batch 1      {published_rate:10.1f} simulations/s   ({len(asked)} questions)")
    print(f"engine, batch {args.batch_size:<14d}{engine_rate:10.1f} simulations/s   ({len(batched)} questions)")
    print(f"plain generation, same batch{plain_rate:10.1f} responses/s")
    print(f"engine / published          {engine_rate / published_rate:10.1f} x")
    print(f"engine / plain generation   {rollout_rate / plain_rate:10.2f}     (rollouts/s over responses/s)")
    print(f"same results                {same:10d} of {len(published)} questions")
    return {
        "published_simulations_per_s": published_rate,
        "engine_simulations_per_s": engine_rate,
        "engine_rollouts_per_s": rollout_rate,
        "plain_responses_per_s": plain_rate,
        "engine_over_published": engine_rate / published_rate,
        "engine_over_plain": rollout_rate / plain_rate,
        "questions_with_same_result": same,
        "questions_compared": len(published),
    }


def _in_processes(args: argparse.Namespace, settings: SearchSettings):
    """(searched questions, simulations, rollouts, seconds, plain responses/s) of all processes together."""
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(args.processes), spawn.SimpleQueue()
    workers = [
        spawn.Process(target=_measure, args=(rank, args, settings, start, results)) for rank in range(args.processes)
    ]
    for worker in workers:
        worker.start()
    parts = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    batched = {question_id: one for part in parts for question_id, one in part["batched"].items()}
    seconds = max(part["seconds"] for part in parts)
    simulations, rollouts = (sum(part[count] for part in parts) for count in ("simulations", "rollouts"))
    return batched, simulations, rollouts, seconds, sum(part["plain_rate"] for part in parts)


def _measure(rank: int, args: argparse.Namespace, settings: SearchSettings, start: Any, results: Any) -> None:
    """One process of `_in_processes`: searches its share of the questions, then answers them plainly."""
    torch.set_num_threads(max(1, args.cores // args.processes))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    model, tokenizer, device = load(args)
    prompts = load_prompts(args, tokenizer, args.questions)[rank :: args.processes]
    few = prompts[: args.batch_size]
    search_batched(
        RolloutEngine(model, tokenizer, args.batch_size), few, SearchSettings(num_simulations=1), 0, len(few)
    )
    start.wait()
    with Stopwatch(device) as watch:
        engine = RolloutEngine(model, tokenizer, args.batch_size)
        batched, simulations = search_batched(engine, prompts, settings, args.seed, args.concurrency)
    seconds = watch.seconds
    start.wait()
    with Stopwatch(device) as watch:
        responses = 0
        while not responses or time.perf_counter() - watch.started < args.least_seconds:
            plain_generation(model, tokenizer, prompts, args.batch_size)
            responses += len(prompts)
    results.put(
        {
            "batched": batched,
            "simulations": simulations,
            "rollouts": engine.rollouts,
            "seconds": seconds,
            "plain_rate": responses / watch.seconds,
        }
    )


def concurrency(args: argparse.Namespace) -> dict[str, Any]:
    """Simulations a second for 1, 2, 4, ... 256 questions at once."""
    model, tokenizer, device = load(args)
    settings = SearchSettings(num_simulations=args.num_simulations)
    search_batched(RolloutEngine(model, tokenizer, 8), load_prompts(args, tokenizer, 8), settings, 0, 8)  # warm up
    points = []
    for at_once in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        # As many questions as are searched at once, so that the concurrency is the same from beginning to end.
        prompts = load_prompts(args, tokenizer, at_once)
        engine = RolloutEngine(model, tokenizer, args.batch_size)
        simulations, watch = 0, Stopwatch(device)
        with watch:
            for seed in itertools.count():
                simulations += search_batched(engine, prompts, settings, seed, at_once)[1]
                if time.perf_counter() - watch.started > args.least_seconds:
                    break
        points.append({"questions_at_once": at_once, "simulations_per_s": simulations / watch.seconds})
        print(f"{at_once:4d} questions at once  {points[-1]['simulations_per_s']:10.1f} simulations/s", flush=True)
    print(f"figure: {draw_search_concurrency(points, args.output_dir / 'search_concurrency.png')}")
    return {"points": points}


def shortcuts(args: argparse.Namespace) -> dict[str, Any]:
    """Throughput with and without reusing the default path's states, in alternating runs."""
    model, tokenizer, device = load(args)
    prompts = load_prompts(args, tokenizer, args.questions)
    settings = SearchSettings(num_simulations=args.num_simulations)
    rates: dict[bool, list[float]] = {True: [], False: []}
    applications: dict[bool, float] = {}
    results = {}
    for repeat in range(args.repeats + 1):
        for reuse in (True, False):
            engine = RolloutEngine(model, tokenizer, args.batch_size, reuse_default_states=reuse)
            with Stopwatch(device) as watch:
                found, simulations = search_batched(engine, prompts, settings, args.seed, args.concurrency)
            if repeat:  # the first pair warms up
                rates[reuse].append(simulations / watch.seconds)
            applications[reuse] = engine.block_tokens / engine.rollouts
            results[reuse] = {question_id: one.result for question_id, one in found.items()}
    same = sum(results[True][question_id] == result for question_id, result in results[False].items())
    gain = statistics.median(rates[True]) / statistics.median(rates[False])
    for reuse, name in ((False, "whole prefill"), (True, "from the first edit")):
        rate, blocks = statistics.median(rates[reuse]), applications[reuse]
        print(f"{name:20s}{rate:10.1f} simulations/s {blocks:8.1f} block applications x tokens a rollout")
    print(f"gain {gain:.2f}x; same results for {same} of {len(prompts)} questions")
    return {
        "whole_prefill_simulations_per_s": rates[False],
        "from_first_edit_simulations_per_s": rates[True],
        "block_tokens_a_rollout": {"whole_prefill": applications[False], "from_first_edit": applications[True]},
        "gain": gain,
        "questions_with_same_result": same,
        "questions_compared": len(prompts),
    }


def policies(args: argparse.Namespace) -> dict[str, Any]:
    """What each policy finds on the same questions, with the spread over seeds.

    "Elsewhere" says what the labels are worth as labels: the accuracy of their paths on four other questions of the
    set, less the default path's accuracy there. A path that is right by luck is right on its own question only.
    """
    model, tokenizer, _ = load(args)
    prompts = load_prompts(args, tokenizer, args.questions)
    columns = {
        "fixed": "wrong made right",
        "saved": "layers saved, right",
        "elsewhere_fixed": "elsewhere, fixes",
        "elsewhere_shorter": "elsewhere, shorter",
        "inferences": "inferences",
    }
    table = {}
    print(f"{len(prompts)} questions, {args.num_simulations} simulations; mean (deviation) of {args.seeds} seeds")
    print("policy    " + "".join(f"{column:>22s}" for column in columns.values()))
    for policy in args.policies.split(","):
        settings = SearchSettings(num_simulations=args.num_simulations, policy=policy)
        by_seed: dict[str, list[float]] = {name: [] for name in columns}
        for seed in range(args.seeds):
            engine = RolloutEngine(model, tokenizer, args.batch_size)
            found, _ = search_batched(engine, prompts, settings, seed, args.concurrency)
            results = [one.result for one in found.values()]
            wrong = [result for result in results if not result.base_correct]
            right = [result for result in results if result.base_correct]
            by_seed["fixed"].append(_mean(result.kind == "wrong_to_right" for result in wrong))
            by_seed["saved"].append(_mean(len(result.best_path) - sum(result.best_path) for result in right))
            by_seed["elsewhere_fixed"].append(_elsewhere(engine, prompts, found, "wrong_to_right"))
            by_seed["elsewhere_shorter"].append(_elsewhere(engine, prompts, found, "shorter"))
            by_seed["inferences"].append(_mean(result.inferences for result in results))
        table[policy] = by_seed
        shown = [f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})" for values in by_seed.values()]
        print(f"{policy:10s}" + "".join(f"{cell:>22s}" for cell in shown), flush=True)
    return {"wrong": len(wrong), "right": len(right), "columns": columns, "by_seed": table}


def _elsewhere(engine: RolloutEngine, prompts: list[Prompt], found: dict[str, SearchedQuestion], kind: str) -> float:
    """Accuracy of the paths of labels of `kind` on four other questions of their set, less the default path's there."""
    by_set: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_set.setdefault(prompt.question.set, []).append(prompt)
    requests = []
    for neighbours in by_set.values():
        for place, prompt in enumerate(neighbours):
            result = found[prompt.question.id].result
            others = [neighbours[(place + step) % len(neighbours)] for step in range(1, 5)]
            if result.kind == kind:
                requests += [Request(other, result.best_path) for other in others if other is not prompt]
    right = _mean(rollout.is_right for rollout in engine.respond(requests))
    return right - _mean(found[request.prompt.question.id].result.base_correct for request in requests)


def _mean(values: Iterable[float]) -> float:
    return statistics.mean([float(value) for value in values] or [0.0])


BENCHMARKS = {"speed": speed, "concurrency": concurrency, "shortcuts": shortcuts, "policies": policies}


@main_guard
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS)
    add("--model", default=str(ROOT / "miniature" / "model"))
    add("--shape", choices=SHAPES, default=None, help="random weights of this shape instead")
    add("--dtype", default="float32")
    add("--dataset", default="arc,dart")
    add("--data_dir", default=str(ROOT / "miniature" / "data"))
    add("--questions", type=int, default=112)
    add("--published_questions", type=int, default=None, help="fewer for the published way; default: all")
    add("--num_simulations", type=int, default=50)
    cores = len(os.sched_getaffinity(0))
    add("--processes", type=int, default=1 if torch.cuda.is_available() else cores, help="speed: of the engine")
    add("--batch_size", type=int, default=128)
    add("--concurrency", type=int, default=256)
    add("--seed", type=int, default=0)
    add("--seeds", type=int, default=5, help="policies: number of seeds")
    add("--policies", default=",".join(POLICIES))
    add("--repeats", type=int, default=3, help="shortcuts: measured pairs")
    add("--least_seconds", type=float, default=5.0, help="a shorter measurement is repeated")
    add("--output_dir", type=Path, default=ROOT / "results")
    args = parser.parse_args(arguments)
    args.cores = cores
    started = time.time()
    figures = BENCHMARKS[args.benchmark](args)
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    for name in ("model", "data_dir", "output_dir"):  # as a reader of the repository would type them
        shown[name] = shown[name].removeprefix(f"{ROOT}/")
    result = {
        "command": " ".join(["python benchmarks/search.py", *(arguments or sys.argv[1:])]),
        "arguments": shown,
        "figures": figures,
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "runtime_s": round(time.time() - started, 1),
    }
    path = args.output_dir / f"search_{args.benchmark}{f'_{args.shape}' if args.shape else ''}.json"
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from error
    print(f"results: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
