"""The paper's ablations of router training, one command each, on any labels.

    python -m experiments.ablations figure5 --data data/

    figure5          router width, router depth, windows
    figure7          loss: focal, weighted cross-entropy, cross-entropy
    figure8          windows, from 1 to 32
    table6           what routers read: the previous block's output, or the embeddings
    teacher_forcing  hidden states along the labelled path, or along the routers' own decisions
    bias_init        output bias from zero, or from the class frequencies
    paths            one best path per question, or all good ones
    class_weights    beta of the class weights, and gamma of the focal loss
    draws            the paper's class weights and last epoch against its beta and the best epoch, over draws of labels

Each setting is trained from several seeds (initial weights, held-out split, order of the data) and tested by the
routers' own decisions on test questions. Where these come from is written in the labels' manifest: the folder of the
question files (or the Hub), the sets, and the chat template. Writes {output}/{name}.json and {output}/{name}.png. What
is finished is kept in --work_dir: run the same command to resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from drllm.arguments import MAX_SEED, add_shared, check_ranges, parse_list
from drllm.checkpoints import join_routers
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file, check_output_folder
from drllm.labels import LabelSet, read_labels
from drllm.manifests import Manifest
from drllm.paper.ablation_report import ROUTER_METRICS, ablation_table, draws_table, summarise
from drllm.paper.experiment_figures import CURVES, draw_experiment
from drllm.provenance import command_line, parse_dtype, write_result
from drllm.questions.sets import GROUPS, expand_sets, load_questions
from drllm.rollouts.rewards import reward_named
from drllm.training.trainer import RouterTrainingConfig, quiet_libraries, train_routers
from extensions.baselines.bench import Bench
from extensions.baselines.protocol import Protocol, made_alike

PROGRAM = "python -m experiments.ablations"
BATCH_SIZE = 64  # questions per forward pass

# Panel -> settings, each a label and the fields of RouterTrainingConfig that it changes.
ABLATIONS: dict[str, dict[str, list[tuple[str, dict]]]] = {
    "figure5": {
        "router width": [(str(width), {"router_width": width}) for width in (16, 32, 64, 128, 256)],
        "router depth": [(str(depth), {"router_depth": depth}) for depth in (1, 2, 3, 4)],
        "windows": [(str(windows), {"num_windows": windows}) for windows in (1, 4, 8, 16)],
    },
    "figure7": {
        # Few labels: the default beta has the paper's class weights, 0.999 is the paper's beta.
        "loss": [(loss, {"loss": loss}) for loss in ("focal", "weighted_ce", "ce")]
        + [(f"{loss}, beta 0.999", {"loss": loss, "beta": "0.999"}) for loss in ("focal", "weighted_ce")]
        + [("weighted_ce, inverse frequency", {"loss": "weighted_ce", "beta": "1"})],
    },
    "figure8": {"windows": [(str(windows), {"num_windows": windows}) for windows in (1, 2, 4, 8, 16, 32)]},
    "table6": {
        "router input": [(reads, {"router_input": reads}) for reads in ("previous_layer", "embeddings")],
    },
    "teacher_forcing": {"teacher forcing": [("on", {"teacher_forcing": True}), ("off", {"teacher_forcing": False})]},
    "bias_init": {"bias init": [(bias, {"bias_init": bias}) for bias in ("zero", "frequency")]},
    "paths": {"paths": [("best", {"paths": "best"}), ("all", {"paths": "all"})]},
    "class_weights": {
        "beta": [(beta, {"beta": beta}) for beta in ("0", "0.9", "0.99", "0.999", "auto")],
        "gamma": [(str(gamma), {"gamma": gamma}) for gamma in (0.0, 1.0, 2.0, 5.0)],
    },
    "draws": {
        "training": [
            (f"beta {beta}, {keep} epoch", {"beta": beta, "keep": keep})
            for beta in ("0.999", "auto")
            for keep in ("best", "last")
        ],
    },
}


def protocol_of(
    labels: Mapping[str, LabelSet], sets: Sequence[str] | None = None, data_dir: Path | None = None
) -> Protocol:
    """How labels were made, by their manifests, and where their test questions are.

    Args:
        labels: folder -> labels of one run.
        sets: question sets that replace those of the labels.
        data_dir: folder of questions that replaces the one that the manifests name.

    Raises:
        UserError: a manifest that does not name its questions, or labels that were made in different ways.
    """
    manifests = [(folder, part.manifest) for folder, part in labels.items()]
    first = made_alike(manifests)
    if data_dir is None:
        folders = {manifest.data_dir for _, manifest in manifests}
        if "" in folders:
            raise UserError(
                "the manifest of the labels names no 'data_dir'; pass --data_dir, the folder of the questions"
            )
        if len(folders) > 1:
            raise UserError(f"the labels come from questions of {', '.join(map(str, folders))}; pass --data_dir")
        data_dir = None if first.data_dir is None else Path(first.data_dir)
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"the folder of questions {data_dir} does not exist; pass the one to test on as --data_dir")
    sets = sets or sorted({label.set for part in labels.values() for label in part.labels})
    reward, dtype = reward_named(first.reward), parse_dtype(first.dtype)
    form = (first.chat_template, first.response_format)
    return Protocol(first.model, first.revision, dtype, reward, *form, data_dir, tuple(sets))


def bench_of(protocol: Protocol, folder: Path, limit: int | None) -> Bench:
    """The base model of the labels and at most `limit` test questions per set.

    Raises:
        UserError: the model or the questions cannot be read, or `folder` belongs to another model.
    """
    test = [question for name in protocol.sets for question in load_questions(name, "test", protocol.data_dir, limit)]
    return protocol.bench(([], test), folder, BATCH_SIZE, PartialState(cpu=not torch.cuda.is_available()).device)


def evaluate(routed: PreTrainedModel, bench: Bench) -> dict[str, float]:
    """Accuracy and layers per forward pass of the routers' own decisions, beside the base model's.

    Names that end in a group, e.g. "accuracy_arc", are means over the group's sets, every set with the same weight.
    """
    paths = bench.decisions(routed, bench.prompts)
    outcome = bench.along(paths, "answering")
    pairs = list(zip(bench.base.right, outcome.right, strict=True))
    of_sets, base = bench.per_set(outcome), bench.per_set(bench.base)
    by_group = {}
    for group, sets in GROUPS.items():
        if members := [name for name in sets if name in of_sets]:
            by_group[f"accuracy_{group}"] = statistics.mean(of_sets[name]["accuracy"] for name in members)
            by_group[f"base_accuracy_{group}"] = statistics.mean(base[name]["accuracy"] for name in members)
            by_group[f"layers_{group}"] = statistics.mean(of_sets[name]["layers"] for name in members)
    return by_group | {
        "accuracy": outcome.accuracy,
        "base_accuracy": bench.base.accuracy,
        "layers": outcome.mean_layers,
        "base_layers": float(bench.num_blocks),
        "wrong_to_right": sum(after > before for before, after in pairs),
        "right_to_wrong": sum(before > after for before, after in pairs),
        "distinct_paths": len(set(paths)),
    }


def _changed(changes: dict) -> list[tuple[str, object]]:
    """The changes that differ from the default, so that the published setting is trained once for all ablations."""
    default = RouterTrainingConfig()
    return sorted((key, value) for key, value in changes.items() if value != getattr(default, key))


def training_history(record: dict[str, Any]) -> list[dict[str, float]]:
    """Epoch, accuracy of each class and macro F1 on held-out labels after each epoch, for Figures 7 and 8.

    Args:
        record: training.json of a checkpoint.
    """
    epochs = [entry for entry in record["history"] if "eval_macro_f1" in entry]
    return [
        {"epoch": entry["epoch"]} | {name: entry[f"eval_{name}"] for name in CURVES if f"eval_{name}" in entry}
        for entry in epochs
    ]


def settings_of(name: str, draws: Sequence[RouterTrainingConfig], seeds: Sequence[int]):
    """(panel, setting, draw of labels, configuration) of each training run of an ablation."""
    for panel, settings in ABLATIONS[name].items():
        for label, changes in settings:
            for draw, config in enumerate(draws):
                for seed in seeds:
                    run_name = "-".join([*(f"{key}={value}" for key, value in _changed(changes)), f"seed={seed}"])
                    yield panel, label, draw, dataclasses.replace(config, run_name=run_name, seed=seed, **changes)


def run_ablation(
    name: str,
    draws: Sequence[RouterTrainingConfig],
    seeds: Sequence[int],
    bench: Bench,
    protocol: Protocol,
    manifest: Manifest,
) -> dict:
    """Trains and tests every setting of an ablation on every draw of labels from every seed.

    Args:
        draws: one configuration per draw of labels, with the fields that no setting changes.
        bench: holds the base model and the test questions.
        protocol: where these come from.
        manifest: manifest of the labels of the first draw.

    Returns:
        The content of the ablation's JSON, without provenance.
    """
    runs = []
    for panel, label, draw, config in settings_of(name, draws, seeds):
        print(f"--- {name}, {panel}: {label}, labels of {' '.join(config.data)}, seed {config.seed}", flush=True)
        record = train_routers(config)
        routed = join_routers(config.checkpoint / "routers", record["base_model"]["name"])
        result = evaluate(routed.to(bench.routed.device), bench)
        print(
            f"test: accuracy {result['accuracy']:.1%} (base {result['base_accuracy']:.1%}), layers "
            f"{result['layers']:.2f} of {result['base_layers']:.0f}",
            flush=True,
        )
        metrics = {metric: record["metrics"][metric] for metric in ROUTER_METRICS}
        history = training_history(record)
        run = {"panel": panel, "setting": label, "draw": draw, "seed": config.seed, "alpha": record["alpha"]}
        runs.append(run | metrics | result | {"history": history})
    return {
        "ablation": name,
        "runs": runs,
        "summary": summarise(runs),
        "test_sets": list(protocol.sets),
        "test_data": "the Hub" if protocol.data_dir is None else str(protocol.data_dir),
        "test_questions": len(bench.prompts),
        "config": dataclasses.asdict(draws[0]) | {"run_name": None, "seed": None},
        "draws": [list(config.data) for config in draws],
        "labels": {
            key: getattr(manifest, key)
            for key in ("model", "model_fingerprint", "num_layers", "dtype", "seed", "labels")
        },
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `seeds` is a list of integers.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", choices=tuple(ABLATIONS), help="the ablation")
    add("--data", nargs="+", default=["data"], help="folders of labels (default: data)")
    add("--draws", nargs="+", help="folders of labels of equal size, in place of --data: routers are trained on each")
    add_shared(parser, "data_dir", says="the one that the labels were made from")
    add("--test_sets", help="sets to test on, e.g. arc,dart (default: those of the labels)")
    add("--limit", type=int, help="most test questions per set (default: all)")
    add("--seeds", default="0,1,2", help="seeds of router training, comma-separated (default: %(default)s)")
    add("--num_epochs", type=int, default=25, help="passes over the labels (default: %(default)s, as in the paper)")
    add("--warmup_steps", type=int, default=500, help="steps of linear warm-up (default: %(default)s, as in the paper)")
    add_shared(parser, "work_dir", Path("out/ablations"))
    add("--output", type=Path, default=Path("results/ablations"), help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.seeds = parse_list("seeds", arguments.seeds, int, "0,1,2")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise UserError(f"--seeds {arguments.seeds}: the same seed twice; the spread is over different ones")
    check_ranges(
        arguments, seeds=(0, MAX_SEED), limit=(1, math.inf), num_epochs=(1, math.inf), warmup_steps=(0, math.inf)
    )
    check_output_folder(arguments.output, "--output")
    for suffix in ("json", "png"):
        check_output_file(arguments.output / f"{arguments.name}.{suffix}", "--output")
    check_output_folder(arguments.work_dir, "--work_dir")
    return arguments


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Runs one ablation, writes its JSON and figure, prints its table."""
    arguments = parse_arguments(argv)
    quiet_libraries()
    start = time.perf_counter()
    draws = [[folder] for folder in arguments.draws] if arguments.draws else [arguments.data]
    labels = {folder: read_labels(folder) for folders in draws for folder in folders}
    sets = expand_sets(arguments.test_sets) if arguments.test_sets else None
    protocol = protocol_of(labels, sets, arguments.data_dir)
    configs = [
        RouterTrainingConfig(
            data=folders,
            output_dir=str(arguments.work_dir / "checkpoints" / (f"draw={draw}" if arguments.draws else "")),
            features_dir=str(arguments.work_dir / "features"),
            num_epochs=arguments.num_epochs,
            warmup_steps=arguments.warmup_steps,
        )
        for draw, folders in enumerate(draws)
    ]
    bench = bench_of(protocol, arguments.work_dir / "answers", arguments.limit)
    manifest = labels[draws[0][0]].manifest
    result = run_ablation(arguments.name, configs, arguments.seeds, bench, protocol, manifest)
    output = arguments.output / arguments.name
    write_result(
        output.with_suffix(".json"),
        result,
        command=command_line(PROGRAM, argv),
        seed=arguments.seeds,
        seconds=time.perf_counter() - start,
        table=draws_table(result) if arguments.draws else None,
    )
    drawn = draw_experiment(result, output.with_suffix(".png"))
    print(f"\n{ablation_table(result)}\nwrote {output}.json, {', '.join(map(str, drawn))}")


if __name__ == "__main__":
    raise SystemExit(main())
