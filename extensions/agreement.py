"""Chooses, among the right paths that a search met, those on which routers agree.

    python train.py --data data/3b --run_name first
    python -m extensions.agreement --checkpoint checkpoints/first --data data/3b --output_dir data/3b-agreed
    python train.py --data data/3b-agreed --run_name second

A question has many right paths, a few of them equally short, and the published label is the one that the search met
first. Here the label is the right path that the trained routers find most probable: each candidate is scored along its
own hidden states, as in training. What was scored is kept in OUTPUT_DIR-scores: run the same command to resume.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from drllm.arguments import add_shared, check_ranges
from drllm.attention import kernels_without_plans
from drllm.checkpoints import load_routed_checkpoint, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.files import beside, check_output_folder
from drllm.labels import SHORTER, Example, Label, read_labels, write_labels
from drllm.manifests import LABELS, begin
from drllm.provenance import commit, fingerprint, versions
from drllm.questions.padding import pad_ids
from drllm.rollouts.scores import ScoreStore
from drllm.training.data import TrainingLabels, make_examples
from train_models.paths import EXECUTE, path_to_layer_indices

PROGRAM = "extensions.agreement"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="label folder of data_generation.py")
    add("--checkpoint", required=True, help="routed checkpoint that was trained on these labels")
    add("--price", type=float, default=0.0, help="nats that each block costs which does not run once (default: 0)")
    add_shared(parser, "device", says="a GPU if there is one")
    add_shared(parser, "batch_size", 16)
    add("--output_dir", type=Path, required=True, help="folder of the chosen labels")
    arguments = parser.parse_args(argv)
    check_ranges(arguments, price=(-math.inf, math.inf), batch_size=(1, math.inf))
    check_output_folder(arguments.output_dir, "--output_dir")
    return arguments


@kernels_without_plans()
@torch.inference_mode()
def score_paths(routed: PreTrainedModel, examples: Sequence[Example], store: ScoreStore, batch_size: int) -> None:
    """Adds to `store` the log-probability, in nats, that the routers of `routed` give each example's path."""
    waiting = [example for example in examples if store.get(example.question, example.path) is None]
    waiting.sort(key=lambda example: len(example.token_ids))
    with tqdm(total=len(waiting), desc="right paths", unit="path", mininterval=1) as progress:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            paths = torch.tensor([example.path for example in batch], device=routed.device)
            logits = routed.model(
                **pad_ids([example.token_ids for example in batch], 0, routed.device),
                layer_indices=[path_to_layer_indices(example.path) for example in batch],
                use_cache=False,
                output_router_logits=True,
            ).router_logits
            nats = logits.log_softmax(-1).gather(-1, paths.unsqueeze(-1)).sum((1, 2)).tolist()
            store.add((example.question, example.path, (value,)) for example, value in zip(batch, nats, strict=True))
            progress.update(len(batch))


def candidates(labels: Sequence[Label]) -> list[Label]:
    """The labels, their `good_paths` limited to what may become the label of a question.

    The label's own path comes first. A longer path does not replace an answer that was right already, and the default
    path teaches nothing (Section 4).
    """

    def may_be_label(label: Label, path: tuple[int, ...]) -> bool:
        is_default = all(visits == EXECUTE for visits in path)
        return not is_default and (label.kind != SHORTER or sum(path) < len(path))

    return [
        replace(label, good_paths=tuple(path for path in label.good_paths if may_be_label(label, path)))
        for label in labels
    ]


def choose(labels: Sequence[Label], store: ScoreStore, price: float) -> list[Label]:
    """Each label with the most probable of its path and its `good_paths`, less `price` per block that is edited.

    The response along a path that is not the search's own label was not kept: it is empty.
    """

    def worth(label: Label, path: tuple[int, ...]) -> float:
        scores = store.get(f"{label.set}/{label.question_id}", path)
        assert scores is not None  # `score_paths` has scored it
        return scores[0] - price * sum(visits != EXECUTE for visits in path)

    chosen = []
    for label in labels:
        best = max(dict.fromkeys([label.path, *label.good_paths]), key=lambda path: worth(label, path))
        response = label.path_response if best == label.path else ""
        chosen.append(replace(label, path=best, path_response=response))
    return chosen


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    label_set = read_labels(arguments.data)
    made_with = label_set.manifest
    routed = load_routed_checkpoint(arguments.checkpoint, made_with.dtype, arguments.device).eval()
    if (found := fingerprint(routed)) != made_with.model_fingerprint:
        raise UserError(
            f"{arguments.checkpoint} has base weights {found}, the labels in {arguments.data} belong to "
            f"{made_with.model_fingerprint}; name the checkpoint that was trained on them"
        )
    routers = fingerprint(routed.model.routers)
    own = {"routers": routers, "price": arguments.price}
    manifest = replace(
        made_with,
        arguments=made_with.arguments | own,
        program=PROGRAM,
        versions=versions(),
        commit=commit(),
        labels=None,
        results={},
    )
    manifest = begin(arguments.output_dir, manifest)
    labels = candidates(label_set.labels)
    examples = make_examples(TrainingLabels(labels, [manifest]), load_tokenizer(arguments.checkpoint), "all")
    key = {"model_fingerprint": found, "dtype": made_with.dtype, "routers": routers}
    store = ScoreStore(beside(arguments.output_dir, "scores"), key)
    try:
        score_paths(routed, examples, store, arguments.batch_size)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was scored is in {store.folder}; run the same command to resume") from None
    chosen = choose(labels, store, arguments.price)
    changed = sum(new.path != old.path for new, old in zip(chosen, labels, strict=True))
    write_labels(arguments.output_dir, manifest, chosen, changed=changed)
    layers = sum(sum(label.path) for label in chosen) / len(chosen)
    print(f"{len(chosen)} labels, {changed} of them changed, {layers:.2f} layers on average")
    print(f"labels: {arguments.output_dir / LABELS}")


if __name__ == "__main__":
    raise SystemExit(main())
