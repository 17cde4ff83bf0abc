"""lm-eval's model `drllm` against its own `hf` on one routed checkpoint: multiple choice, and greedy generation.

    python benchmarks/evaluation.py --model checkpoints/demo --threads 1,2
    python benchmarks/evaluation.py --shape llama-3.2-3b --dtype bfloat16 --batch_sizes 1,16,64 --new_tokens 256

`hf` gives a routed model context and continuation without their lengths and pads them without a mask, so its results
depend on the batch and the published command needs batch size 1. Those of `drllm` do not, so each of its batch sizes is
compared with `hf` at batch size 1. Both score four options of ARC-form questions: of one token each, as MMLU's letters,
and of many tokens each, as PIQA's and HellaSwag's texts (here the beginnings of other questions).

At batch size 1 `drllm` makes one forward pass per question for one-token options, as `hf` does, so there is little to
gain, and two for many-token options (the prompt, then all options on its cache) where `hf` makes four. From batch size
8 on, passes are shared by questions. Prints seconds per question, reference time / drllm time for each batch size from
runs that take turns with the same number of threads (`benchmarks/pairs.py`), and the largest difference of
log-likelihoods with static routing, where both compute the same function.

--new_tokens times greedy generation of so many tokens per question, against `hf` at the same batch size: 1 and the
largest of --batch_sizes.

--model is a routed checkpoint, or a plain one, which gets freshly initialised routers. --shape makes one with random
weights and prompts as long as those of ARC; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from benchmarks.pairs import LEAST_PAIRS, Pairs, load_per_core, parse_threads, rounds, torch_threads  # noqa: E402
from benchmarks.random_base import WORD_SHAPES, prompt_tokens, random_text, write_random_base  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402
from drllm.arguments import A_GPU, add_shared, check_device, check_ranges, parse_list  # noqa: E402
from drllm.attention import kernels_without_plans  # noqa: E402
from drllm.checkpoints import checkpoint_info, load_routed, load_tokenizer  # noqa: E402
from drllm.errors import main_guard  # noqa: E402
from drllm.evaluation.lm_eval_model import RoutedLM  # noqa: E402
from drllm.files import check_output_file  # noqa: E402
from drllm.provenance import command_line, parse_dtype, write_result  # noqa: E402
from drllm.questions.prompts import render_prompt  # noqa: E402
from drllm.questions.sets import load_questions  # noqa: E402

EXECUTE_BIAS = 2.0  # of fresh routers on random weights: most blocks run, as trained routers decide


def instances(kind: str, arguments: list[list[tuple]]) -> list[Instance]:
    """lm-eval's requests: `arguments[question]` lists those of one question."""
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=index, metadata=("benchmark", number, 1))
        for number, of_question in enumerate(arguments)
        for index, each in enumerate(of_question)
    ]


def prompts_of(args: argparse.Namespace) -> tuple[list[str], list[list[str]]]:
    """The prompts, and four texts of --words words for each."""
    if args.shape:
        rng = random.Random(0)
        lengths = rng.choices(prompt_tokens("arc_easy", "arc_challenge"), k=args.questions)
        return [random_text(rng, length) for length in lengths], [
            [random_text(rng, args.words) for _ in range(4)] for _ in lengths
        ]
    questions = load_questions("arc_easy", "test", args.data_dir, args.questions + 4)
    beginnings = [" ".join(question.text.split()[: args.words]) for question in questions]
    asked = questions[: args.questions]
    return [render_prompt(question) for question in asked], [beginnings[n + 1 : n + 5] for n in range(len(asked))]


@contextmanager
def routed_checkpoint(args: argparse.Namespace) -> Iterator[str]:
    """The folder of --model itself if it is routed, else of a temporary checkpoint with freshly initialised routers."""
    if args.model and (info := checkpoint_info(args.model)).is_routed:
        info.routed_classes()  # imports them, so that `hf` needs no code of the checkpoint
        yield args.model
        return
    with tempfile.TemporaryDirectory() as scratch:
        base, folder = args.model or f"{scratch}/base", f"{scratch}/routed"
        if args.shape:
            write_random_base(Path(base), SHAPES[args.shape], parse_dtype(args.dtype), args.device)
        routed = load_routed(base, parse_dtype(args.dtype), None, {})
        if args.shape:
            with torch.no_grad():
                for router in routed.model.routers:
                    router.layers[-1].bias[1] = EXECUTE_BIAS
        routed.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
        del routed
        yield folder


def seconds_per_question(answer: Callable, requests: list[Instance], questions: int) -> float:
    """Wall time of one answering of all requests over the number of questions."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    with kernels_without_plans():  # as `drllm` has it: the same kernels on both sides
        answer(requests, disable_tqdm=True)
    return (time.perf_counter() - start) / questions


class Bench:
    """Both models on one checkpoint, and what was measured."""

    def __init__(self, args: argparse.Namespace, checkpoint: str):
        options = {"dtype": args.dtype, "device": args.device, "batch_size": 1}
        self.args = args
        self.hf = HFLM(checkpoint, trust_remote_code=False, **options)
        self.ours = RoutedLM(checkpoint, **options)
        self.figures: list[dict] = []  # one per comparison, seconds per question

    def largest_difference(self, requests: list[Instance]) -> float:
        """Largest difference of log-likelihoods with static routing over all batch sizes, in nats."""
        answers = []
        for lm, sizes in ((self.hf, [1]), (self.ours, self.args.batch_sizes)):
            lm.model.model.is_static_routing = True
            for lm.batch_size_per_gpu in sizes:
                answers.append([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
            lm.model.model.is_static_routing = False
        return max(abs(a - b) for ours in answers[1:] for a, b in zip(ours, answers[0], strict=True))

    def compare(self, kind: str, requests: list[Instance], hf_size: int, sizes: list[int], threads: int) -> dict:
        """By batch size of `drllm`: the record of its pairs with `hf` at batch size `hf_size`, which all take turns."""
        method = "generate_until" if requests[0].request_type == "generate_until" else "loglikelihood"
        questions = len({request.metadata[1] for request in requests})

        def seconds(lm, batch_size: int) -> float:
            lm.batch_size_per_gpu = batch_size
            return seconds_per_question(getattr(lm, method), requests, questions)

        sides = {"hf": functools.partial(seconds, self.hf, hf_size)}
        sides |= {f"drllm {size}": functools.partial(seconds, self.ours, size) for size in sizes}
        load = load_per_core()
        with torch_threads(threads):
            *_, times = rounds(sides, self.args.pairs, f"{kind}, {threads} threads")
        records = {}
        for size in sizes:
            hf, ours = times["hf"], times[f"drllm {size}"]
            pairs, title = Pairs(tuple(hf), tuple(ours), load), f"{kind}, {threads} threads, batch {size}"
            middle = {"ours_seconds": statistics.median(ours), "reference_seconds": statistics.median(hf)}
            self.figures.append({"name": title, **middle, "ratio": pairs.ratio, "problems": pairs.problems()})
            shown = [f"{1000 * value:.1f} ms" for value in middle.values()]
            print(f"  {title}: drllm {shown[0]} per question, hf at batch {hf_size} {shown[1]}: {pairs}", flush=True)
            records[size] = pairs.record()
        return records


def measure(args: argparse.Namespace, bench: Bench) -> Iterator[dict]:
    """All ratios, for both kinds of options and generation, threads and batch sizes; what is known so far each time."""
    prompts, texts = prompts_of(args)
    letters = [["w1", "w2", "w3", "w4"] if args.shape else list("ABCD")] * len(prompts)
    result: dict = {"figures": bench.figures}
    for kind, options in (("one-token options", letters), ("many-token options", texts)):
        pairs = [[(prompt, f" {option}") for option in each] for prompt, each in zip(prompts, options, strict=True)]
        requests = instances("loglikelihood", pairs)
        difference = bench.largest_difference(requests)
        print(f"{kind}: log-likelihoods differ by at most {difference:.1e}")
        result[kind] = {"largest_difference": difference}
        for threads in args.threads:
            result[kind][f"threads_{threads}"] = bench.compare(kind, requests, 1, args.batch_sizes, threads)
            yield result
    if args.new_tokens:
        settings = {"until": [], "max_gen_toks": args.new_tokens, "do_sample": False}
        result["generation"] = {"new_tokens": args.new_tokens}
        for size in sorted({1, max(args.batch_sizes)}):
            requests = instances("generate_until", [[(prompt, settings)] for prompt in prompts[:size]])
            for threads in args.threads:
                by_size = result["generation"].setdefault(f"threads_{threads}", {})
                by_size |= bench.compare("generation", requests, size, [size], threads)
                yield result


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Compares, prints, and writes the result after each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    add_shared(source, "model", about=", or of a routed checkpoint")
    source.add_argument("--shape", choices=WORD_SHAPES, help="random weights at this shape")
    add_shared(parser, "data_dir", ROOT / "miniature" / "data", "the miniature's")
    parser.add_argument("--questions", type=int, default=100, help="ARC-Easy test questions")
    parser.add_argument("--words", type=int, default=12, help="length of a many-token option")
    parser.add_argument("--new_tokens", type=int, default=0, help="generated tokens per question; 0: no generation")
    parser.add_argument("--batch_sizes", default="1,8,32", help="questions per forward pass, comma-separated")
    parser.add_argument("--threads", default="1", help="CPU threads of both sides, comma-separated, e.g. 1,2")
    parser.add_argument("--pairs", type=int, default=LEAST_PAIRS, help="runs of each side, in turn")
    add_shared(parser, "dtype", "float32")
    add_shared(parser, "device", "cuda" if torch.cuda.is_available() else "cpu", A_GPU)
    add_shared(parser, "output")
    args = parser.parse_args(argv)
    args.threads = parse_threads(args.threads)
    args.batch_sizes = parse_list("batch_sizes", args.batch_sizes, int, "1,8")
    some = dict.fromkeys(("questions", "words", "batch_sizes", "pairs"), (1, math.inf))
    check_ranges(args, new_tokens=(0, math.inf), **some)
    parse_dtype(args.dtype)
    check_device(args.device)
    if args.output is not None:
        check_output_file(args.output, "--output")
    started = time.time()
    with routed_checkpoint(args) as checkpoint:
        for result in measure(args, Bench(args, checkpoint)):
            if args.output is not None:
                command = command_line("python benchmarks/evaluation.py", argv)
                named = {"questions": args.questions, "model": args.model or args.shape, **result}
                write_result(args.output, named, command=command, seed=None, seconds=time.time() - started)


if __name__ == "__main__":
    raise SystemExit(main())
