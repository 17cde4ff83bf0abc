"""How fast the search is, and what each of its policies finds.

    python benchmarks/search.py speed          # against the published way and against plain batched generation
    python benchmarks/search.py concurrency    # throughput for 1 to 256 questions at once, with a figure
    python benchmarks/search.py shortcuts      # the gain of starting rollouts at the first edited block
    python benchmarks/search.py policies       # what each search policy finds in 50 simulations
    python benchmarks/search.py speed --model FOLDER --reward likelihood --dataset arc --questions 24   # an LLM
    python benchmarks/search.py speed --shape llama-3.2-3b --dtype bfloat16   # random weights, on a GPU

Both sides of a ratio run in turn with the same number of threads (`benchmarks/pairs.py`); ratios that noise makes
unusable are marked. Each benchmark writes its figures, with command, seed, versions, commit and runtime, to
results/speed/search_*.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pairs import LEAST_PAIRS, Pairs, load_per_core, parse_threads, rounds, run_pairs, torch_threads  # noqa: E402
from benchmarks.search_sides import (  # noqa: E402
    DEFAULT_QUESTIONS,
    EngineProcesses,
    Stopwatch,
    generate_one,
    limit_of,
    load,
    load_prompts,
    make_engine,
    matrix_rate,
    same_results,
    score_options,
    search_batched,
    search_published,
)
from benchmarks.shapes import SHAPES  # noqa: E402
from drllm import provenance  # noqa: E402
from drllm.arguments import MAX_SEED, add_shared, check_ranges  # noqa: E402
from drllm.attention import kernels_without_plans  # noqa: E402
from drllm.errors import UserError, main_guard  # noqa: E402
from drllm.files import check_output_folder  # noqa: E402
from drllm.paper.experiment_figures import draw_search_concurrency  # noqa: E402
from drllm.provenance import command_line, write_result  # noqa: E402
from drllm.questions.sets import expand_sets  # noqa: E402
from drllm.rollouts.engine import Request  # noqa: E402
from drllm.rollouts.rewards import reward_named  # noqa: E402
from drllm.search.inputs import rows_or_auto  # noqa: E402
from drllm.search.tree import POLICIES, SearchSettings  # noqa: E402

DEFAULT_AT_ONCE = 256
Save = Callable[[dict[str, Any]], None]  # writes the figures so far


def speed(args: argparse.Namespace, save: Save) -> dict[str, Any]:
    """The engine against the published way (same questions, seeds and rewards) and against plain generation.

    With N threads the engine and plain generation use N processes of one thread, each with its share of the questions,
    as `accelerate launch --num_processes N data_generation.py` does, and the published way N threads for its one
    rollout. On a GPU there is one process, and both references run with torch's own choice of attention kernels, too.
    """
    loaded = load(args)
    figures: dict[str, Any] = {}
    for threads in args.threads:
        with torch_threads(threads):
            for so_far in _speed_at(threads, args, loaded):
                figures[f"threads_{threads}"] = so_far
                save(figures)
        _print_speed(threads, figures[f"threads_{threads}"])
    return figures


def _speed_at(threads: int, args: argparse.Namespace, loaded: tuple) -> Iterator[dict[str, Any]]:
    """`speed` with one number of threads: its figures after each round."""
    model, tokenizer, device = loaded
    on_gpu, generates = device.type == "cuda", reward_named(args.reward).generates
    few = load_prompts(args, tokenizer, args.published_questions or args.questions or DEFAULT_QUESTIONS)
    settings = SearchSettings(num_simulations=args.num_simulations)
    respond = functools.partial(generate_one if generates else score_options, model, tokenizer)
    blocks = model.config.num_hidden_layers
    results: dict[str, Any] = {}
    engine = EngineProcesses(1 if on_gpu else threads, args, loaded)

    def published(kernels: Callable) -> float:
        with kernels(), Stopwatch(device) as watch:
            results["published"], results["simulations"] = search_published(respond, blocks, few, settings, args.seed)
        return watch.seconds

    def processes(task: str) -> float:
        results[task] = engine.run(task)
        return max(part["seconds"] for part in results[task])

    sides = {"engine": functools.partial(processes, "search")}
    sides["published"] = functools.partial(published, kernels_without_plans)
    if on_gpu:
        sides["published, as torch chooses"] = functools.partial(published, contextlib.nullcontext)
    for name in (("plain", "plain, as torch chooses") if on_gpu else ("plain",)) if generates else ():
        sides[name] = functools.partial(processes, name)
    load = load_per_core()
    rate = matrix_rate(model, device)
    try:
        for times in rounds(sides, args.pairs, f"{threads} threads"):
            parts = results["search"]
            done = {name: sum(part[name] for part in parts) for name in ("simulations", "rollouts", "block_tokens")}
            figures: dict[str, Any] = {"rows": parts[0]["rows"], "questions": sum(part["questions"] for part in parts)}
            for name in sides.keys() - {"engine"}:
                is_plain = name.startswith("plain")
                units = figures["questions"] if is_plain else results["simulations"]
                ours = done["rollouts" if is_plain else "simulations"]
                sides_of = [tuple(s / n for s in times[side]) for side, n in ((name, units), ("engine", ours))]
                figures[f"engine_over_{name}"] = Pairs(*sides_of, load).record()
            seconds = statistics.median(times["engine"])
            weights = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
            batched = {question_id: one for part in parts for question_id, one in part["batched"].items()}
            yield figures | {
                "published_simulations_per_s": results["simulations"] / statistics.median(times["published"]),
                "engine_simulations_per_s": done["simulations"] / seconds,
                "engine_rollouts_per_s": done["rollouts"] / seconds,
                "block_operations_per_s": 2 * weights * done["block_tokens"] / seconds,
                "matrix_operations_per_s": rate,
                "share_of_matrix_rate": 2 * weights * done["block_tokens"] / seconds / rate,
                "grading": _grading(parts),
                "captures": parts[0].get("captures"),
                "captures_refused": parts[0].get("captures_refused"),
                "questions_with_same_result": same_results(batched, results["published"]),
                "questions_compared": len(few),
            }
    finally:
        engine.close()


def _print_speed(threads: int, figures: dict[str, Any]) -> None:
    published, engine = (figures[f"{side}_simulations_per_s"] for side in ("published", "engine"))
    print(f"{threads} threads, {figures['questions']} questions, {figures['rows']} rows per batch")
    print(f"  simulations/s: {published:.1f} published way, {engine:.1f} engine")
    for name, pairs in figures.items():
        if name.startswith("engine_over_"):
            problems = f"  UNUSABLE: {'; '.join(pairs['problems'])}" if pairs["problems"] else ""
            low, high = min(pairs["ratios"]), max(pairs["ratios"])
            print(f"  {name.replace('_', ' ')}: {pairs['ratio']:.2f}x (pairs {low:.2f} to {high:.2f}){problems}")
    print(f"  arithmetic of the blocks over the rate of matrix products: {figures['share_of_matrix_rate']:.1%}")
    if figures["captures"] is not None:
        refused = ", of which one failed: steps were launched one by one" if figures["captures_refused"] else ""
        print(f"  captured decoding steps: {figures['captures']}{refused}")
    if grading := figures["grading"]:
        print(f"  grading: {grading['answers']} answers, {grading['ms_per_answer']:.2f} ms each")
        print(f"  the device waits for grades {grading['share_waiting']:.1%} of the time")
    print(f"  same results: {figures['questions_with_same_result']} of {figures['questions_compared']} questions")


def _grading(parts: list[dict[str, Any]]) -> dict[str, float] | None:
    """What grading cost in the processes of a search; None for a reward that grades nothing."""
    grading = [part["grading"] for part in parts if "grading" in part]
    if not grading:
        return None
    answers = sum(one["graded"] for one in grading)
    return {
        "answers": answers,
        "ms_per_answer": 1000 * sum(one["seconds"] for one in grading) / max(answers, 1),
        "share_waiting": sum(one["waited"] for one in grading) / sum(part["seconds"] for part in parts),
    }


def concurrency(args: argparse.Namespace, save: Save) -> dict[str, Any]:
    """Simulations per second for 1, 2, 4, ... 256 questions at once."""
    model, tokenizer, device = load(args)
    settings = SearchSettings(num_simulations=args.num_simulations)
    limit = limit_of(args, model, load_prompts(args, tokenizer, DEFAULT_QUESTIONS))
    search_batched(make_engine(args, model, tokenizer, limit), load_prompts(args, tokenizer, 8), settings, 0, 8)
    points = []
    for at_once in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        # As many questions as are searched at once, so that the concurrency does not change during the run.
        prompts = load_prompts(args, tokenizer, at_once)
        engine = make_engine(args, model, tokenizer, limit)
        simulations, watch = 0, Stopwatch(device)
        with watch:
            for seed in itertools.count():
                simulations += search_batched(engine, prompts, settings, seed, at_once)[1]
                if time.perf_counter() - watch.started > args.least_seconds:
                    break
        points.append({"questions_at_once": at_once, "simulations_per_s": simulations / watch.seconds})
        print(f"{at_once:4d} questions at once  {points[-1]['simulations_per_s']:10.1f} simulations/s", flush=True)
        save({"points": points})
    print(f"figure: {draw_search_concurrency(points, args.output_dir / 'search_concurrency.png')}")
    return {"points": points}


def shortcuts(args: argparse.Namespace, save: Save) -> dict[str, Any]:
    """Throughput with and without reusing hidden states of earlier rollouts, in turn."""
    model, tokenizer, device = load(args)
    prompts = load_prompts(args, tokenizer, args.questions or DEFAULT_QUESTIONS)
    limit, at_once = limit_of(args, model, prompts), args.concurrency or DEFAULT_AT_ONCE
    settings = SearchSettings(num_simulations=args.num_simulations)
    off = {"reuse_default_states": False} if reward_named(args.reward).generates else {"state_bytes": 0}
    options = {"whole_prefill": off, "from_first_edit": {}}
    results, cost, figures = {}, {}, {}

    def side(name: str) -> float:
        engine = make_engine(args, model, tokenizer, limit, **options[name])
        with Stopwatch(device) as watch:
            searched, simulations = search_batched(engine, prompts, settings, args.seed, at_once)
        results[name] = {question_id: one.result for question_id, one in searched.items()}
        cost[name] = engine.block_tokens / engine.rollouts
        return watch.seconds / simulations

    for threads in args.threads:
        with torch_threads(threads):
            pairs = run_pairs(*(functools.partial(side, name) for name in options), args.pairs, f"{threads} threads")
        figures[f"threads_{threads}"] = pairs.record()
        print(f"{threads} threads: gain {pairs}")
    same = sum(results["from_first_edit"][name] == result for name, result in results["whole_prefill"].items())
    for name, applications in cost.items():
        print(f"{name:20s}{applications:10.1f} block applications x tokens per rollout")
    print(f"same results for {same} of {len(prompts)} questions")
    return figures | {
        "block_tokens_per_rollout": cost,
        "questions_with_same_result": same,
        "questions_compared": len(prompts),
    }


def policies(args: argparse.Namespace, save: Save) -> dict[str, Any]:
    """What each policy finds on the same questions, with the spread over seeds.

    "Elsewhere" measures the labels as labels: the accuracy of their paths on four other questions of the set minus the
    default path's accuracy there. A path that is right by luck is right on its own question only.
    """
    model, tokenizer, _ = load(args)
    prompts = load_prompts(args, tokenizer, args.questions or DEFAULT_QUESTIONS)
    limit, at_once = limit_of(args, model, prompts), args.concurrency or DEFAULT_AT_ONCE
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
            engine = make_engine(args, model, tokenizer, limit)
            searched, _ = search_batched(engine, prompts, settings, seed, at_once)
            results = [one.result for one in searched.values()]
            wrong = [result for result in results if not result.base_correct]
            right = [result for result in results if result.base_correct]
            by_seed["fixed"].append(_mean(result.kind == "wrong_to_right" for result in wrong))
            by_seed["saved"].append(_mean(len(result.best_path) - sum(result.best_path) for result in right))
            by_seed["elsewhere_fixed"].append(_elsewhere(engine, prompts, searched, "wrong_to_right"))
            by_seed["elsewhere_shorter"].append(_elsewhere(engine, prompts, searched, "shorter"))
            by_seed["inferences"].append(_mean(result.inferences for result in results))
        table[policy] = by_seed
        shown = [f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})" for values in by_seed.values()]
        print(f"{policy:10s}" + "".join(f"{cell:>22s}" for cell in shown), flush=True)
    return {"wrong": len(wrong), "right": len(right), "columns": columns, "by_seed": table}


def _elsewhere(engine: Any, prompts: list[Any], searched: dict[str, Any], kind: str) -> float:
    """Accuracy of the paths of labels of `kind` on four other questions of their set minus the default path's there."""
    by_set: dict[str, list[Any]] = {}
    for prompt in prompts:
        by_set.setdefault(prompt.question.set, []).append(prompt)
    requests = []
    for neighbours in by_set.values():
        for index, prompt in enumerate(neighbours):
            result = searched[prompt.question.id].result
            others = [neighbours[(index + step) % len(neighbours)] for step in range(1, 5)]
            if result.kind == kind:
                requests += [Request(other, result.best_path) for other in others if other is not prompt]
    right = _mean(rollout.is_right for rollout in engine.respond(requests))
    return right - _mean(searched[request.prompt.question.id].result.base_correct for request in requests)


def _mean(values: Iterable[float]) -> float:
    return statistics.mean([float(value) for value in values] or [0.0])


BENCHMARKS = {"speed": speed, "concurrency": concurrency, "shortcuts": shortcuts, "policies": policies}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS, help="what is measured")
    add_shared(parser, "model", str(ROOT / "miniature" / "model"), "the miniature")
    add("--shape", choices=SHAPES, default=None, help="random weights of this shape instead")
    add_shared(parser, "dtype", "float32")
    add_shared(parser, "reward", "generation", choices=("generation", "likelihood"))
    add_shared(parser, "dataset", "arc,dart")
    add_shared(parser, "data_dir", ROOT / "miniature" / "data", "the miniature's", about='; "hub" for the Hub')
    add("--questions", type=int, help="questions that are searched; default: 112, on a GPU those of two full batches")
    add("--published_questions", type=int, default=None, help="fewer for the published way; default: all")
    add("--num_simulations", type=int, default=50, help="simulations per question")
    add("--threads", default="1", help="speed, shortcuts: CPU threads of both sides, comma-separated, e.g. 1,2")
    add("--pairs", type=int, default=LEAST_PAIRS, help="speed, shortcuts: runs of each side, in turn")
    add_shared(parser, "batch_size", "auto", type=rows_or_auto)
    add("--concurrency", type=int, help="questions searched at once; default: two batches")
    add_shared(parser, "seed", 0)
    add("--seeds", type=int, default=5, help="policies: number of seeds")
    add("--policies", default=",".join(POLICIES), help="policies: those of the tree, comma-separated")
    add("--least_seconds", type=float, default=5.0, help="concurrency: a shorter measurement is repeated")
    add("--output_dir", type=Path, default=ROOT / "results", help="folder of the result")
    args = parser.parse_args(arguments)
    args.threads = parse_threads(args.threads)
    args.data_dir = None if str(args.data_dir) == "hub" else args.data_dir
    some = ("questions", "published_questions", "num_simulations", "pairs", "batch_size", "concurrency", "seeds")
    ranges = dict.fromkeys(some, (1, math.inf)) | {"seed": (0, MAX_SEED), "least_seconds": (0, math.inf)}
    check_ranges(args, **ranges)
    sets = expand_sets(args.dataset)
    reward_named(args.reward).check_sets(sets)
    if args.shape and not reward_named(args.reward).generates:
        raise UserError("--shape: random weights have prompts of random tokens, which have no options; omit --reward")
    provenance.parse_dtype(args.dtype)
    if unknown := set(args.policies.split(",")) - set(POLICIES):
        raise UserError(f"--policies: {sorted(unknown)[0]!r} is not a policy; choose from {', '.join(POLICIES)}")
    check_output_folder(args.output_dir, "--output_dir")
    return args


@main_guard
def main(arguments: list[str] | None = None) -> None:
    """Runs one benchmark and writes its result."""
    args = parse_arguments(arguments)
    started = time.time()
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    for name in ("model", "data_dir", "output_dir"):  # relative to the repository
        shown[name] = shown[name] and shown[name].removeprefix(f"{ROOT}/")
    parts = ["search", args.benchmark, args.shape, None if reward_named(args.reward).generates else args.reward]
    path = args.output_dir / f"{'_'.join(part for part in parts if part)}.json"
    command = command_line("python benchmarks/search.py", arguments)

    def save(figures: dict[str, Any]) -> None:
        """Also before the end: what is measured outlives a run that is cut off."""
        result = {"arguments": shown, "figures": figures, "threads": torch.get_num_threads()}
        write_result(path, result, command=command, seed=args.seed, seconds=time.time() - started)

    save(BENCHMARKS[args.benchmark](args, save))
    print(f"results: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
