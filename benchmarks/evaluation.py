"""Multiple-choice scoring: the lm-eval model `drllm` against lm-eval's own `hf` at batch size 1, on one checkpoint.

    python benchmarks/evaluation.py --model checkpoints/demo --threads 1,2

`hf` gives a routed model context and continuation without their lengths and pads them without a mask, so its results
depend on the batch and the published command needs batch size 1. Those of `drllm` do not, so each of its batch sizes is
compared with `hf` at batch size 1. Both score four options of ARC-form questions: of one token each, as MMLU's letters,
and of many tokens each, as PIQA's and HellaSwag's texts (here the beginnings of other questions).

At batch size 1 `drllm` makes one forward pass per question for one-token options, as `hf` does, so there is little to
gain, and two for many-token options (the prompt, then all options on its cache) where `hf` makes four. From batch size
8 on, passes are shared by questions. Prints seconds per question, reference time / drllm time for each batch size from
runs that take turns with the same number of threads (`benchmarks/pairs.py`), and the largest difference of
log-likelihoods with static routing, where both compute the same function.

--model is a routed checkpoint, or a plain one, which gets freshly initialised routers.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from benchmarks.pairs import LEAST_PAIRS, parse_threads, run_pairs, torch_threads  # noqa: E402
from drllm.arguments import A_GPU, add_shared, check_device, check_ranges, parse_list  # noqa: E402
from drllm.checkpoints import checkpoint_info, load_routed, load_tokenizer  # noqa: E402
from drllm.errors import main_guard  # noqa: E402
from drllm.evaluation.lm_eval_model import RoutedLM  # noqa: E402
from drllm.files import check_output_file  # noqa: E402
from drllm.provenance import command_line, parse_dtype, write_result  # noqa: E402
from drllm.questions.prompts import render_prompt  # noqa: E402
from drllm.questions.sets import load_questions  # noqa: E402


def make_requests(data_dir: str, count: int, words: int) -> list[Instance]:
    """Four options for each of the first `count` questions: letters, or with `words` > 0 texts of that many words."""
    questions = load_questions("arc_easy", "test", data_dir, count + 4)
    requests = []
    for number, question in enumerate(questions[:count]):
        texts = [" ".join(other.text.split()[:words]) for other in questions[number + 1 : number + 5]]
        requests += [
            Instance(
                request_type="loglikelihood",
                doc={},
                arguments=(render_prompt(question), f" {option}"),
                idx=index,
                metadata=("benchmark", number, 1),
            )
            for index, option in enumerate(texts if words else "ABCD")
        ]
    return requests


@contextmanager
def routed_checkpoint(name: str, dtype: str) -> Iterator[str]:
    """`name` itself if it is routed, else a temporary copy with freshly initialised routers."""
    info = checkpoint_info(name)
    if info.is_routed:
        info.routed_classes()  # imports them, so that `hf` needs no code of the checkpoint
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        load_routed(name, parse_dtype(dtype), None, {}).save_pretrained(folder)
        load_tokenizer(name).save_pretrained(folder)
        yield folder


def seconds_per_question(lm: HFLM, requests: list[Instance], questions: int) -> float:
    """Wall time of one scoring of all requests over the number of questions."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    lm.loglikelihood(requests, disable_tqdm=True)
    return (time.perf_counter() - start) / questions


def largest_difference(reference: HFLM, contestants: list[HFLM], requests: list[Instance]) -> float:
    """Largest difference of log-likelihoods with static routing, in nats."""
    answers = []
    for lm in (reference, *contestants):
        lm.model.model.is_static_routing = True
        answers.append([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
        lm.model.model.is_static_routing = False
    return max(abs(a - b) for ours in answers[1:] for a, b in zip(ours, answers[0], strict=True))


def compare(args: argparse.Namespace, checkpoint: str) -> dict:
    """All ratios, for both kinds of options, threads and batch sizes."""
    options = {"dtype": args.dtype, "device": args.device}
    reference = HFLM(checkpoint, batch_size=1, trust_remote_code=False, **options)
    contestants = {size: RoutedLM(checkpoint, batch_size=size, **options) for size in args.batch_sizes}
    result = {}
    for kind, words in (("one-token options", 0), ("many-token options", args.words)):
        requests = make_requests(args.data_dir, args.questions, words)
        difference = largest_difference(reference, list(contestants.values()), requests)
        print(f"{kind}: log-likelihoods differ by at most {difference:.1e}")
        result[kind] = {"largest_difference": difference}
        score = functools.partial(seconds_per_question, requests=requests, questions=args.questions)
        for threads in args.threads:
            by_size = result[kind][f"threads_{threads}"] = {}
            for size, lm in contestants.items():
                sides = (functools.partial(score, reference), functools.partial(score, lm))
                title = f"{threads} threads, batch {size}"
                with torch_threads(threads):
                    pairs = run_pairs(*sides, args.pairs, title)
                by_size[size] = pairs.record()
                hf, ours = (1000 * statistics.median(side) for side in (pairs.reference, pairs.ours))
                print(f"  {title}: hf at batch 1 {hf:.1f} ms per question, drllm {ours:.1f} ms: {pairs}")
    return result


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Compares, prints, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_shared(parser, "model", required=True, about=", or of a routed checkpoint")
    add_shared(parser, "data_dir", ROOT / "miniature" / "data", "the miniature's")
    parser.add_argument("--questions", type=int, default=100, help="ARC-Easy test questions")
    parser.add_argument("--words", type=int, default=12, help="length of a many-token option")
    parser.add_argument("--batch_sizes", default="1,8,32", help="questions per forward pass, comma-separated")
    parser.add_argument("--threads", default="1", help="CPU threads of both sides, comma-separated, e.g. 1,2")
    parser.add_argument("--pairs", type=int, default=LEAST_PAIRS, help="runs of each side, in turn")
    add_shared(parser, "dtype", "float32")
    add_shared(parser, "device", "cuda" if torch.cuda.is_available() else "cpu", A_GPU)
    add_shared(parser, "output")
    args = parser.parse_args(argv)
    args.threads = parse_threads(args.threads)
    args.batch_sizes = parse_list("batch_sizes", args.batch_sizes, int, "1,8")
    check_ranges(args, **dict.fromkeys(("questions", "words", "batch_sizes", "pairs"), (1, math.inf)))
    parse_dtype(args.dtype)
    check_device(args.device)
    if args.output is not None:
        check_output_file(args.output, "--output")
    started = time.time()
    with routed_checkpoint(args.model, args.dtype) as checkpoint:
        result = {"questions": args.questions, "model": args.model, **compare(args, checkpoint)}
    if args.output is not None:
        command = command_line("python benchmarks/evaluation.py", argv)
        write_result(args.output, result, command=command, seed=None, seconds=time.time() - started)


if __name__ == "__main__":
    raise SystemExit(main())
