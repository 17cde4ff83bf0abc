"""The control knob p over a validation split: accuracy and layers at each p, and the p to choose (Appendix B).

    python -m experiments.sweep checkpoints/drllm --labels data/ --data_dir miniature/data --output results/sweep.json

Validation questions are training questions that no label was made from (`--labels` names the labels). The chosen p has
the fewest layers among those whose accuracy is at least the base model's; the test questions play no part.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from drllm.arguments import A_GPU, HelpFormatter, add_shared, check_device, check_ranges, parse_list
from drllm.errors import UserError, main_guard
from drllm.evaluation.layer_counts import LayerCounts
from drllm.evaluation.lm_eval_model import RoutedLM
from drllm.evaluation.protocol import response_format_of, uses_chat_template
from drllm.evaluation.results import Estimate
from drllm.files import check_output_file
from drllm.labels import read_labels
from drllm.provenance import command_line, parse_dtype, write_result
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question, expand_sets, load_questions

PROGRAM = "python -m experiments.sweep"
KNOBS = (-1.0, -0.9, -0.7, -0.6, -0.55, -0.5, -0.45, -0.4, -0.3, -0.2, -0.1, 0.0, 0.25, 0.5, 0.6, 0.75, 1.0)
BINS = 20


def validation_questions(
    sets: list[str], data_dir: Path | None, labels: Path | None, limit: int | None
) -> list[Question]:
    """Training questions of `sets` that have no label in `labels`, at most `limit` per set.

    Raises:
        UserError: when no question is left.
    """
    labelled = set() if labels is None else {(label.set, label.question_id) for label in read_labels(labels).labels}
    questions = []
    for name in sets:
        free = [
            question
            for question in load_questions(name, "train", data_dir)
            if (question.set, question.id) not in labelled
        ]
        questions += free[:limit]
    if not questions:
        raise UserError("every training question has a label: no question is left to validate on")
    return questions


def run_at(lm: RoutedLM, prompts: list[Prompt], control: float) -> dict:
    """Accuracy, layers and shares of actions with the knob at `control`."""
    lm.model.model.routing_control = control
    lm.layer_counts = LayerCounts()
    greedy = {"until": [], "do_sample": False, "repetition_penalty": 1.0}  # as the search answers
    requests = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(prompt.text, greedy | {"max_gen_toks": prompt.max_new_tokens}),
            idx=0,
            metadata=("sweep", number, 1),
        )
        for number, prompt in enumerate(prompts)
    ]
    responses = lm.generate_until(requests, disable_tqdm=True)
    right = Estimate.of(
        float(prompt.response_format.grade(prompt.question, response))
        for prompt, response in zip(prompts, responses, strict=True)
    )
    counts = lm.layer_counts.summary()["sweep"]
    return {
        "routing_control": control,
        "accuracy": right.mean,
        "accuracy_stderr": right.stderr or 0.0,
        "blocks_per_query": counts["blocks_per_query"],
        "blocks_per_pass": counts["blocks_per_pass"],
        "share": counts["share"],
    }


@torch.no_grad()
def probability_histogram(lm: RoutedLM, prompts: list[str], batch_size: int) -> dict[str, list]:
    """Counts of the routers' probabilities of each action, over blocks and prompts, in equal bins of [0, 1].

    Returns:
        "edges" [BINS + 1], and for each action its counts [BINS].
    """
    edges = torch.linspace(0, 1, BINS + 1)
    counts = torch.zeros(3, BINS)
    for start in range(0, len(prompts), batch_size):
        tokens, mask = lm.tok_batch_encode(prompts[start : start + batch_size])
        output = lm.model(
            input_ids=tokens.to(lm.device),
            attention_mask=mask.to(lm.device),
            output_router_logits=True,
            use_cache=False,
            logits_to_keep=1,
        )
        probabilities = output.router_logits.softmax(-1).cpu().reshape(-1, 3)
        for action in range(3):
            counts[action] += torch.histogram(probabilities[:, action].contiguous(), edges).hist
    names = dict(zip(("skip", "execute", "repeat"), counts.int().tolist(), strict=True))
    return {"edges": edges.tolist(), **names}


def choose(points: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """The point with the fewest layers of those at least as accurate as `base`, which takes part itself."""
    good = [point for point in points if point["accuracy"] >= base["accuracy"]]
    return min([*good, base], key=lambda point: (point["blocks_per_query"], -point["accuracy"]))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `knobs` is a list of numbers.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(prog=PROGRAM, formatter_class=HelpFormatter, description=__doc__)
    add = parser.add_argument
    add("checkpoint", help="a routed checkpoint of train.py")
    add_shared(parser, "output", required=True)
    add_shared(parser, "dataset", "arc,dart")
    add_shared(parser, "data_dir", says="the Hub")
    add("--labels", type=Path, help="folder of labels whose questions are left out")
    add("--limit", type=int, default=100, help="questions per set")
    add("--knobs", default=",".join(map(str, KNOBS)), help="values of p, comma-separated; write --knobs=-0.5,0")
    add(
        "--chat_template",
        action=argparse.BooleanOptionalAction,
        help="whether prompts are a user's turn (default: as with the checkpoint's labels)",
    )
    add_shared(parser, "dtype", "auto", "that of the checkpoint")
    add_shared(parser, "batch_size", 32)
    add_shared(parser, "device", says=A_GPU)
    arguments = parser.parse_args(argv)
    arguments.knobs = parse_list("knobs", arguments.knobs, float, "-0.5,0")
    check_ranges(arguments, knobs=(-1, 1), limit=(1, math.inf), batch_size=(1, math.inf))
    if arguments.dtype != "auto":
        parse_dtype(arguments.dtype)
    check_device(arguments.device)
    check_output_file(arguments.output, "--output")
    return arguments


def sweep(lm: RoutedLM, prompts: list[Prompt], knobs: list[float]) -> dict:
    """The base model and the routed one at each of `knobs`, printed as a table while it is measured."""
    lm.model.model.is_static_routing = True
    base = run_at(lm, prompts, -0.5) | {"routing_control": 0.5}
    lm.model.model.is_static_routing = False
    points = []
    print(f"{'p':>6} {'accuracy':>9} {'layers':>8}   (base: {100 * base['accuracy']:.2f}, ", end="")
    print(f"{base['blocks_per_query']:.2f}; {len(prompts)} questions)")
    for knob in knobs:
        points.append(run_at(lm, prompts, knob))
        print(f"{knob:6.2f} {100 * points[-1]['accuracy']:9.2f} {points[-1]['blocks_per_query']:8.2f}", flush=True)
    return {
        "questions": len(prompts),
        "base": base,
        "points": points,
        "chosen": choose(points, base),
        "probabilities": probability_histogram(lm, [prompt.text for prompt in prompts], lm.batch_size),
    }


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    sets = expand_sets(arguments.dataset)
    questions = validation_questions(sets, arguments.data_dir, arguments.labels, arguments.limit)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lm = RoutedLM(arguments.checkpoint, dtype=arguments.dtype, device=device, batch_size=arguments.batch_size)
    if not lm.is_routed:
        raise UserError(f"{arguments.checkpoint} is a plain checkpoint without routers")
    chat = arguments.chat_template
    if chat is None:
        chat = uses_chat_template("auto", Path(arguments.checkpoint))
    responses = response_format_of(Path(arguments.checkpoint))
    print(f"{'with' if chat else 'without'} chat template; responses: {responses.describe() or 'the default format'}")
    prompts = [Prompt.of(question, lm.tokenizer, chat, responses) for question in questions]
    result = {"checkpoint": arguments.checkpoint, "dataset": arguments.dataset}
    result |= {"chat_template": chat, "response_format": responses.as_dict()}
    result |= sweep(lm, prompts, arguments.knobs)
    seconds = time.perf_counter() - start
    write_result(arguments.output, result, command=command_line(PROGRAM, argv), seed=None, seconds=seconds)
    chosen, base = result["chosen"], result["base"]
    print(f"p = {chosen['routing_control']} keeps the base accuracy with the fewest layers", end=": ")
    print(f"{chosen['blocks_per_query']:.2f} of {base['blocks_per_query']:.2f}; wrote {arguments.output}")


if __name__ == "__main__":
    raise SystemExit(main())
