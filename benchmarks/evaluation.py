"""Multiple-choice scoring: the lm-eval model `drllm` against lm-eval's own `hf` at batch size 1, on one checkpoint.

    python benchmarks/evaluation.py --checkpoint checkpoints/demo

`hf` gives a routed model context and continuation without their lengths and pads them without a mask, so its results
depend on the batch and the published command needs batch size 1. Those of `drllm` don't, so it may use any: each of its
batch sizes is compared with `hf` at batch size 1. Both score four options of ARC-form questions: of one token each, as
MMLU's letters, and of many tokens each, as PIQA's and HellaSwag's texts (here the beginnings of other questions).

At batch size 1 `drllm` makes one forward pass a question for one-token options, as `hf` does, so little can be won
there, and two for many-token options (the prompt, then all options on its cache) where `hf` makes four. From batch size
8 on passes are shared by questions. Prints reference time / drllm time for each batch size, and the largest difference
of log-likelihoods with static routing, where both compute the same function.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from drllm import provenance  # noqa: E402
from drllm.errors import main_guard  # noqa: E402
from drllm.evaluation.lm_eval_model import RoutedLM  # noqa: E402
from drllm.questions.prompts import render_prompt  # noqa: E402
from drllm.questions.sets import load_questions  # noqa: E402


def make_requests(data_dir: str, count: int, words: int) -> list[Instance]:
    """Four options for each of the first `count` questions: letters, or with `words` > 0 texts of so many words."""
    questions = load_questions("arc_easy", "test", data_dir, count + 4)
    requests = []
    for number, question in enumerate(questions[:count]):
        texts = [" ".join(other.text.split()[:words]) for other in questions[number + 1 : number + 5]]
        requests += [
            Instance(
                request_type="loglikelihood",
                doc={},
                arguments=(render_prompt(question), f" {option}"),
                idx=place,
                metadata=("benchmark", number, 1),
            )
            for place, option in enumerate(texts if words else "ABCD")
        ]
    return requests


def seconds(lm: HFLM, requests: list[Instance]) -> float:
    """Wall time of one scoring of all requests."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - start


@main_guard
def main() -> None:
    """Interleaves the contestants and prints ratios of medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data_dir", default=str(ROOT / "miniature" / "data"))
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--words", type=int, default=12, help="of a many-token option")
    parser.add_argument("--batch_sizes", default="1,8,32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON of the result")
    args = parser.parse_args()
    options = {"dtype": args.dtype, "device": args.device}
    reference = HFLM(args.checkpoint, batch_size=1, trust_remote_code=True, **options)
    contestants = {
        int(size): RoutedLM(args.checkpoint, batch_size=int(size), **options) for size in args.batch_sizes.split(",")
    }
    result = {"questions": args.questions}
    for kind, words in (("one-token options", 0), ("many-token options", args.words)):
        requests = make_requests(args.data_dir, args.questions, words)
        for lm in (reference, *contestants.values()):
            lm.model.model.is_static_routing = False
        times = {"hf": [], **{size: [] for size in contestants}}
        for _ in range(args.repeats + 1):  # the first round warms up
            times["hf"].append(seconds(reference, requests))
            for size, lm in contestants.items():
                times[size].append(seconds(lm, requests))
        median = {name: statistics.median(found[1:]) for name, found in times.items()}
        answers = []
        for lm in (reference, *contestants.values()):
            lm.model.model.is_static_routing = True
            answers.append([value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)])
        difference = max(abs(a - b) for ours in answers[1:] for a, b in zip(ours, answers[0], strict=True))
        speedup = {size: median["hf"] / median[size] for size in contestants}
        result[kind] = {"hf_seconds": median["hf"], "speedup": speedup, "largest_difference": difference}
        print(f"{kind}: hf at batch 1 {median['hf']:.2f} s; log-likelihoods differ by at most {difference:.1e}")
        for size in contestants:
            print(f"  drllm at batch {size:3d}: {speedup[size]:5.2f} times as fast as hf at batch 1")
    if args.output is not None:
        result |= {"command": " ".join(sys.argv), "versions": provenance.versions(), "commit": provenance.commit()}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
