"""The control knob p over a validation split: accuracy and layers at each p, and the p to choose.

    python -m drllm.sweep checkpoints/drllm --labels data/ --data_dir miniature/data --output results/NAME/sweep.json

Validation questions are training questions that no label was made from (`--labels` names the labels). Reported is the
p with the fewest layers among those whose accuracy is at least the base model's; the test questions play no part.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance

from drllm import provenance
from drllm.errors import UserError, main_guard
from drllm.evaluation.comparison import uses_chat_template
from drllm.evaluation.layer_counts import LayerCounts
from drllm.evaluation.lm_eval_model import RoutedLM
from drllm.evaluation.runs import Estimate
from drllm.labels import read_labels
from drllm.questions.grading import grade
from drllm.questions.prompts import apply_template, render_prompt, response_limit
from drllm.questions.sets import Question, expand_sets, load_questions

KNOBS = (-0.9, -0.7, -0.6, -0.55, -0.5, -0.45, -0.4, -0.3, -0.2, -0.1, 0.0, 0.25, 0.5)
BINS = 20


def validation_questions(
    sets: list[str], data_dir: Path | None, labels: Path | None, limit: int | None
) -> list[Question]:
    """Training questions of `sets` that have no label in `labels`, at most `limit` a set."""
    labelled = set() if labels is None else {(row["set"], row["question_id"]) for row in read_labels(labels).rows}
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


def run_at(lm: RoutedLM, questions: list[Question], prompts: list[str], chat: bool, control: float) -> dict:
    """Accuracy, layers and shares with the knob at `control`; `prompts` are the questions' with the template."""
    lm.model.model.routing_control = control
    lm.layer_counts = LayerCounts()
    greedy = {"until": [], "do_sample": False, "repetition_penalty": 1.0}  # as the search answers
    requests = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(prompt, greedy | {"max_gen_toks": response_limit(question, chat)}),
            idx=0,
            metadata=("sweep", number, 1),
        )
        for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True))
    ]
    responses = lm.generate_until(requests, disable_tqdm=True)
    right = Estimate.of(
        float(grade(question, response)) for question, response in zip(questions, responses, strict=True)
    )
    counted = lm.layer_counts.summary()["sweep"]
    return {
        "routing_control": control,
        "accuracy": right.mean,
        "accuracy_stderr": right.stderr or 0.0,
        "blocks_per_query": counted["blocks_per_query"],
        "blocks_per_pass": counted["blocks_per_pass"],
        "share": counted["share"],
    }


@torch.no_grad()
def probability_histogram(lm: RoutedLM, prompts: list[str], batch_size: int) -> dict[str, list]:
    """Counts of the routers' probabilities of each action, over blocks and prompts, in equal bins of [0, 1]."""
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
    """The point with the fewest layers of those at least as accurate as the base model; the base itself is one."""
    good = [point for point in points if point["accuracy"] >= base["accuracy"]]
    return min([*good, base], key=lambda point: (point["blocks_per_query"], -point["accuracy"]))


@main_guard
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m drllm.sweep", formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=__doc__
    )
    add = parser.add_argument
    add("checkpoint", help="a routed checkpoint of train.py")
    add("--output", type=Path, required=True, help="JSON file")
    add("--dataset", default="arc,dart", help="question sets and groups, by comma")
    add("--data_dir", type=Path, help="local files of the Hub's schema; default: the Hub")
    add("--labels", type=Path, help="folder of labels whose questions are left out")
    add("--limit", type=int, default=100, help="questions a set")
    add("--knobs", default=",".join(map(str, KNOBS)), help="values of p; write --knobs=-0.5,0")
    add(
        "--chat_template",
        action=argparse.BooleanOptionalAction,
        help="prompts are a user's turn; default: as with the checkpoint's labels",
    )
    add("--dtype", default="auto")
    add("--batch_size", type=int, default=32)
    add("--device", default=None)
    args = parser.parse_args()
    try:
        knobs = [float(knob) for knob in args.knobs.split(",")]
    except ValueError:
        raise UserError(f"--knobs={args.knobs} must be numbers, by comma") from None
    if any(not -1 <= knob <= 1 for knob in knobs):
        raise UserError(f"--knobs={args.knobs}: each p lies in [-1, 1]")
    questions = validation_questions(expand_sets(args.dataset), args.data_dir, args.labels, args.limit)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    lm = RoutedLM(args.checkpoint, dtype=args.dtype, device=device, batch_size=args.batch_size)
    if not lm.is_routed:
        raise UserError(f"{args.checkpoint} is a plain checkpoint without routers")
    chat = args.chat_template
    if chat is None:
        chat = uses_chat_template("auto", Path(args.checkpoint))
    prompts = [apply_template(render_prompt(question), lm.tokenizer, chat) for question in questions]
    lm.model.model.is_static_routing = True
    base = run_at(lm, questions, prompts, chat, -0.5) | {"routing_control": 0.5}
    lm.model.model.is_static_routing = False
    points = []
    print(f"{'p':>6} {'accuracy':>9} {'layers':>8}   (base: {100 * base['accuracy']:.2f}, ", end="")
    print(f"{base['blocks_per_query']:.2f}; {len(questions)} questions)")
    for knob in knobs:
        points.append(run_at(lm, questions, prompts, chat, knob))
        print(f"{knob:6.2f} {100 * points[-1]['accuracy']:9.2f} {points[-1]['blocks_per_query']:8.2f}", flush=True)
    chosen = choose(points, base)
    result = {
        "checkpoint": args.checkpoint,
        "dataset": args.dataset,
        "questions": len(questions),
        "base": base,
        "points": points,
        "chosen": chosen,
        "probabilities": probability_histogram(lm, prompts, args.batch_size),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"p = {chosen['routing_control']} keeps the base accuracy with the fewest layers", end=": ")
    print(f"{chosen['blocks_per_query']:.2f} of {base['blocks_per_query']:.2f}; wrote {args.output}")


if __name__ == "__main__":
    raise SystemExit(main())
