"""Step 1 of 3: searches a routing label for every training question (Section 4 of the paper).

    python data_generation.py                                     # the bundled toy model ("miniature"), on a laptop
    accelerate launch --num_processes 8 data_generation.py --model meta-llama/Llama-3.2-3B-Instruct --dataset arc,dart

Writes labels.jsonl and manifest.json into --output_dir. A run that was stopped at any moment is resumed by the same
command, with any number of processes and any batch size.
"""

from __future__ import annotations

from drllm.errors import main_guard, require_packages

require_packages("torch", "transformers", "accelerate", "datasets", "math_verify")

import argparse
import functools
import math
from pathlib import Path

import torch

from data_models import load_path_model
from drllm.arguments import HelpFormatter, check_ranges
from drllm.loading import check_finite, loading
from drllm.manifests import LABELS, PROGRAM
from drllm.questions.per_set import numbers_per_set
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import SETS, expand_sets
from drllm.rollouts.rewards import reward_named
from drllm.search.inputs import SearchInputs, add_arguments, check_arguments
from drllm.search.pool import SearchPool
from drllm.search.report import shortfall_lines, surplus_line, table2_text
from drllm.search.run import search_labels
from drllm.search.selection import Selection
from drllm.search.tree import POLICIES, STOPS, SearchSettings

DEFAULT_SAMPLES = 1000  # of sets that are not in Table 2


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults are the paper's."""
    parser = argparse.ArgumentParser(description="Search routing labels.", formatter_class=HelpFormatter)
    add, paper = parser.add_argument, SearchSettings()
    add_arguments(parser, paper)
    add("--budget", type=float, default=paper.budget, help="longest path, in multiples of the number of blocks")
    add("--p_rand", type=float, default=paper.random_child, help="probability of a random child")
    add("--policy", choices=POLICIES, default=paper.policy, help="which nodes of the tree grow")
    add(
        "--stop_at",
        choices=STOPS,
        default=paper.stop_at,
        help="what ends a search early: the first right path of a wrong answer (Algorithm 1); any_gain: also the first "
        "shorter right path of a right answer (Section 4.2); never: nothing",
    )
    add(
        "--samples",
        default="paper",
        help='labels to keep per set: "paper" (Table 2), a number, or e.g. arc_easy=400,dart-1=200 (rest: paper)',
    )
    add("--wrong_to_right_share", type=float, default=0.3, help="target share of all labels")
    add("--limit", type=int, default=None, help="most questions searched per set")
    add("--chat_template", choices=("auto", "on", "off"), default="auto", help="auto: for instruct models")
    add(
        "--max_new_tokens",
        default="default",
        help="limit of a response: a number, or e.g. arc=10,dart=20; default: ARC 10 with a chat template, else 2; "
        "DART 15",
    )
    add("--inject_boxed", action="store_true", help=r"end math prompts with \boxed{ (Appendix A, for base models)")
    add(
        "--strict_letters",
        action="store_true",
        help="multiple choice: the response must begin with A, B, C or D, standing alone, after an optional Answer: "
        "(Appendix A), so items with labels 1 to 4 or E are wrong; without it, every item's own labels count, in the "
        "usual phrasings",
    )
    add(
        "--concurrency",
        type=int,
        default=None,
        help="questions searched at once; default: 2 batches, at most the labels",
    )
    return parser.parse_args(arguments)


def load_model(name: str, dtype: torch.dtype, revision: str | None):
    """A model that follows paths. UserError: no such model, a family that is not supported, non-finite weights."""
    with loading(name, "model", revision):
        model = load_path_model(name, dtype=dtype, revision=revision)
    check_finite(model, name)
    return model


@main_guard
def main(arguments: list[str] | None = None) -> None:
    """Runs step 1."""
    args = parse_arguments(arguments)
    settings = check_arguments(args, SearchSettings())
    check_ranges(args, wrong_to_right_share=(0, 1), limit=(1, math.inf), concurrency=(1, math.inf))
    reward_named(args.reward).check_format(args.chat_template, args.inject_boxed, args.strict_letters)
    sets = expand_sets(args.dataset)
    samples = {name: SETS[name].samples or DEFAULT_SAMPLES for name in sets}
    samples |= numbers_per_set("--samples", args.samples, sets, "paper")
    limits = numbers_per_set("--max_new_tokens", args.max_new_tokens, sets, "default")
    response_format = ResponseFormat(limits, args.inject_boxed, args.strict_letters)
    inputs = SearchInputs.load(args, load_model, dict.fromkeys(sets, args.limit), response_format, args.chat_template)
    own = {"samples": samples, "wrong_to_right_share": args.wrong_to_right_share, "limit": args.limit}
    manifest = inputs.manifest(PROGRAM, settings, **own)
    orders = {name: [prompt.question for prompt in prompts] for name, prompts in inputs.prompts.items()}
    prompts = {prompt.question.id: prompt for of_set in inputs.prompts.values() for prompt in of_set}
    concurrency = args.concurrency or inputs.questions_at_once(sum(samples.values()))
    new_pool = functools.partial(SearchPool, inputs.engine(for_search=True), settings, args.seed, concurrency)
    selection = Selection(orders, samples, args.wrong_to_right_share)
    folder = Path(args.output_dir)
    completed = search_labels(folder, manifest, selection, prompts, new_pool, inputs.state)
    if completed is not None:
        print(table2_text(completed.results["table2"]))
        for line in (surplus_line(selection), *shortfall_lines(completed), f"labels: {folder / LABELS}"):
            print(line)
    inputs.state.wait_for_everyone()
    inputs.state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
