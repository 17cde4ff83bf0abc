"""The paper's ablations of router training, one command each, on the miniature or on labels of your own.

    python -m drllm.ablations figure5 --data runs/demo/data

    figure5          router width, router depth, windows
    figure7          loss: focal, weighted cross-entropy, cross-entropy
    figure8          windows, from 1 to 32
    table6           what routers read: the block before, or the embeddings
    teacher_forcing  hidden states along the labelled path, or along the routers' own decisions
    bias_init        output bias from zero, or from the class frequencies
    paths            one best path a question, or all good ones
    class_weights    beta of the class weights, and gamma of the focal loss

Each setting is trained from several seeds (initial weights, held-out split, order of the data) and tested on the test
questions by the routers' own decisions. Writes {output}/{name}.json and {output}/{name}.png. What is finished is
kept in --work_dir, so a command that was stopped continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from drllm.checkpoints import join_routers, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.labels import read_labels
from drllm.provenance import commit, versions
from drllm.questions.prompts import Prompt
from drllm.questions.sets import expand_sets, load_questions
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.training.features import pad_ids
from drllm.training.trainer import RouterTrainingConfig, quiet_libraries, train_routers
from train_models.paths import default_path

MINIATURE_DATA = Path(__file__).resolve().parent.parent / "miniature" / "data"

# Panel -> settings, each a label and the fields of RouterTrainingConfig that it changes.
ABLATIONS: dict[str, dict[str, list[tuple[str, dict]]]] = {
    "figure5": {
        "router width": [(str(width), {"router_width": width}) for width in (16, 32, 64, 128, 256)],
        "router depth": [(str(depth), {"router_depth": depth}) for depth in (1, 2, 3, 4)],
        "windows": [(str(windows), {"num_windows": windows}) for windows in (1, 4, 8, 16)],
    },
    "figure7": {
        "loss": [(loss, {"loss": loss}) for loss in ("focal", "weighted_ce", "ce")]
        + [("weighted_ce, inverse frequency", {"loss": "weighted_ce", "beta": 1.0})],
    },
    "figure8": {"windows": [(str(windows), {"num_windows": windows}) for windows in (1, 2, 4, 8, 16, 32)]},
    "table6": {
        "router input": [(reads, {"router_input": reads}) for reads in ("previous_layer", "embeddings")],
    },
    "teacher_forcing": {"teacher forcing": [("on", {"teacher_forcing": True}), ("off", {"teacher_forcing": False})]},
    "bias_init": {"bias init": [(bias, {"bias_init": bias}) for bias in ("zero", "frequency")]},
    "paths": {"paths": [("best", {"paths": "best"}), ("all", {"paths": "all"})]},
    "class_weights": {
        "beta": [(str(beta), {"beta": beta}) for beta in (0.0, 0.9, 0.99, 0.999)],
        "gamma": [(str(gamma), {"gamma": gamma}) for gamma in (0.0, 1.0, 2.0, 5.0)],
    },
}
ROUTER_METRICS = ("macro_f1", "f1_skip", "f1_execute", "f1_repeat")


@dataclass(frozen=True)
class Answers:
    """Questions that no label was made from, as prompts, and what the base model makes of them."""

    prompts: list[Prompt]
    base_right: list[bool]


def load_test_questions(
    engine: RolloutEngine, sets: Sequence[str], data_dir: Path, chat: bool, limit: int | None
) -> Answers:
    """The test questions of `sets`, answered along the default path. At most `limit` a set."""
    questions = [q for name in sets for q in load_questions(name, "test", data_dir, limit)]
    prompts = [Prompt.of(question, engine.tokenizer, chat) for question in questions]
    path = default_path(engine.num_blocks)
    right = [rollout.is_right for rollout in engine.respond([Request(prompt, path) for prompt in prompts])]
    return Answers(prompts, right)


@torch.no_grad()
def routed_paths(routed, prompts: Sequence[Prompt], batch_size: int = 64) -> list[tuple[int, ...]]:
    """The path that the routers decide on for each prompt."""
    paths: list[tuple[int, ...]] = [()] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_ids([prompts[i].input_ids for i in chosen], 0, routed.device)
        decided = routed.model(**batch, use_cache=False).paths.tolist()
        for i, path in zip(chosen, decided, strict=True):
            paths[i] = tuple(path)
    return paths


def evaluate(routed, engine: RolloutEngine, test: Answers) -> dict[str, float]:
    """Accuracy and block applications of a prefill with the routers' own decisions, beside the base model's."""
    paths = routed_paths(routed, test.prompts)
    engine.model = routed
    rollouts = engine.respond([Request(prompt, path) for prompt, path in zip(test.prompts, paths, strict=True)])
    right = [rollout.is_right for rollout in rollouts]
    pairs = list(zip(test.base_right, right, strict=True))
    return {
        "accuracy": statistics.mean(right),
        "base_accuracy": statistics.mean(test.base_right),
        "layers": statistics.mean(sum(path) for path in paths),
        "base_layers": float(engine.num_blocks),
        "wrong_to_right": sum(after and not before for before, after in pairs),
        "right_to_wrong": sum(before and not after for before, after in pairs),
        "distinct_paths": len(set(paths)),
    }


def _evaluate_once(routed, engine: RolloutEngine, test: Answers, path: Path) -> dict[str, float]:
    """`evaluate`, or what it found for this checkpoint and these questions before."""
    questions = sorted(prompt.question.id for prompt in test.prompts)
    if path.exists() and (found := json.loads(path.read_text()))["questions"] == questions:
        return found["result"]
    result = evaluate(routed, engine, test)
    path.write_text(json.dumps({"result": result, "questions": questions}))
    return result


def _changed(changes: dict) -> list[tuple[str, object]]:
    """The changes that are some, so that the published setting is trained once for all ablations."""
    default = RouterTrainingConfig()
    return sorted((key, value) for key, value in changes.items() if value != getattr(default, key))


def run_ablation(
    name: str, base_config: RouterTrainingConfig, seeds: Sequence[int], test_sets, data_dir, limit
) -> dict:
    """Train and test every setting of an ablation from every seed; returns the content of its JSON."""
    manifest = read_labels(base_config.data[0]).manifest
    tokenizer = load_tokenizer(base_config.model_id or manifest["model"], manifest["revision"])
    chat = bool(manifest["chat_template"])
    sets = test_sets or sorted({row["set"] for folder in base_config.data for row in read_labels(folder).rows})
    runs, engine, test = [], None, None
    start = time.perf_counter()
    for panel, settings in ABLATIONS[name].items():
        for label, changes in settings:
            for seed in seeds:
                run_name = "-".join([*(f"{key}={value}" for key, value in _changed(changes)), f"seed={seed}"])
                config = dataclasses.replace(base_config, run_name=run_name, seed=seed, **changes)
                print(f"--- {name}, {panel}: {label}, seed {seed}", flush=True)
                record = train_routers(config)
                routed = join_routers(config.checkpoint / "routers", record["base_model"]["name"])
                routed.to("cuda" if torch.cuda.is_available() else "cpu")
                if engine is None:
                    engine = RolloutEngine(routed, tokenizer, batch_size=64, reuse_default_states=False)
                    test = load_test_questions(engine, sets, data_dir, chat, limit)
                result = _evaluate_once(routed, engine, test, config.checkpoint / "test.json")
                print(
                    f"test: accuracy {result['accuracy']:.1%} (base {result['base_accuracy']:.1%}), layers "
                    f"{result['layers']:.2f} of {result['base_layers']:.0f}",
                    flush=True,
                )
                metrics = {metric: record["metrics"][metric] for metric in ROUTER_METRICS}
                runs.append({"panel": panel, "setting": label, "seed": seed, **metrics, **result})
    return {
        "ablation": name,
        "runs": runs,
        "summary": summarise(runs),
        "test_sets": list(sets),
        "test_questions": len(test.prompts),
        "config": dataclasses.asdict(base_config) | {"run_name": None, "seed": None},
        "labels": {key: manifest[key] for key in ("model_fingerprint", "num_layers", "dtype", "seed", "labels")},
        "seconds": time.perf_counter() - start,
    }


def summarise(runs: Sequence[dict]) -> list[dict]:
    """Mean and standard deviation over seeds of every number, a setting a row."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["panel"], run["setting"]].append(run)
    summary = []
    for (panel, setting), members in groups.items():
        row = {"panel": panel, "setting": setting, "seeds": len(members)}
        for name, value in members[0].items():
            if name != "seed" and isinstance(value, int | float):
                values = [float(member[name]) for member in members]
                row[name] = {
                    "mean": statistics.mean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                }
        summary.append(row)
    return summary


def table(result: dict) -> str:
    """The summary as text, mean ± standard deviation over seeds."""
    lines = [
        f"{'setting':34}{'macro F1':>14}{'F1 skip':>14}{'F1 repeat':>14}{'accuracy %':>14}{'layers':>14}",
    ]
    panel = None
    for row in result["summary"]:
        if row["panel"] != panel:
            panel = row["panel"]
            lines.append(panel)
        cells = [
            f"{scale * row[name]['mean']:.{digits}f} ± {scale * row[name]['std']:.{digits}f}"
            for name, scale, digits in (
                ("macro_f1", 1, 3),
                ("f1_skip", 1, 3),
                ("f1_repeat", 1, 3),
                ("accuracy", 100, 1),
                ("layers", 1, 2),
            )
        ]
        lines.append(f"  {row['setting']:32}" + "".join(f"{cell:>14}" for cell in cells))
    first = result["summary"][0]
    lines.append(
        f"base model: accuracy {100 * first['base_accuracy']['mean']:.1f}%, {first['base_layers']['mean']:.0f} layers; "
        f"{result['test_questions']} test questions, {first['seeds']} seeds"
    )
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """A column a panel: F1 scores above, accuracy and layers of the routed model below, bars of one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(row["panel"] for row in result["summary"]))
    figure, axes = plt.subplots(2, len(panels), figsize=(1.5 + 4 * len(panels), 6), squeeze=False)
    for column, panel in enumerate(panels):
        rows = [row for row in result["summary"] if row["panel"] == panel]
        x = list(range(len(rows)))

        def curve(axis, name: str, label: str, scale: float = 1.0, rows=rows, x=x, **style):
            means = [scale * row[name]["mean"] for row in rows]
            deviations = [scale * row[name]["std"] for row in rows]
            return axis.errorbar(x, means, deviations, label=label, marker="o", capsize=3, **style)

        top, bottom = axes[0][column], axes[1][column]
        for name in ROUTER_METRICS:
            curve(top, name, name, linewidth=2 if name == "macro_f1" else 1)
        top.set_ylim(0, 1)
        top.set_ylabel("F1 on held-out questions")
        curve(bottom, "accuracy", "accuracy", 100, color="tab:blue")
        base = 100 * rows[0]["base_accuracy"]["mean"]
        bottom.axhline(base, color="tab:blue", linestyle=":", label="accuracy, base model")
        bottom.set_ylabel("accuracy on test questions, %", color="tab:blue")
        layers = bottom.twinx()
        curve(layers, "layers", "layers", color="tab:red", linestyle="--")
        layers.set_ylabel("layers of a forward pass", color="tab:red")
        for axis in (top, bottom):
            axis.set_xticks(x, [row["setting"] for row in rows], rotation=20 if len(rows[-1]["setting"]) > 6 else 0)
            axis.set_xlabel(panel)
        if column == 0:
            top.legend(fontsize="small")
            bottom.legend(fontsize="small")
    figure.suptitle(f"{result['ablation']}: {result['summary'][0]['seeds']} seeds, mean and standard deviation")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Run one ablation, write its JSON and figure, print its table."""
    parser = argparse.ArgumentParser(prog="python -m drllm.ablations", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=tuple(ABLATIONS))
    parser.add_argument("--data", nargs="+", default=["data"], help="folders of labels (default: data)")
    parser.add_argument(
        "--data_dir", type=Path, default=MINIATURE_DATA, help="test questions (default: miniature/data)"
    )
    parser.add_argument("--test_sets", help="sets to test on, e.g. arc,dart (default: those of the labels)")
    parser.add_argument("--limit", type=int, help="at most so many test questions a set")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--num_epochs", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--warmup_steps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/ablations"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("results/ablations"), help="default: %(default)s")
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds {args.seeds}: expected whole numbers with commas between, e.g. 0,1,2") from None
    base_config = RouterTrainingConfig(
        data=tuple(args.data),
        output_dir=str(args.work_dir / "checkpoints"),
        features_dir=str(args.work_dir / "features"),
        num_epochs=args.num_epochs,
        warmup_steps=args.warmup_steps,
    )
    sets = expand_sets(args.test_sets) if args.test_sets else None
    result = run_ablation(args.name, base_config, seeds, sets, args.data_dir, args.limit)
    arguments = sys.argv[1:] if argv is None else argv
    result = {"command": " ".join(["python -m drllm.ablations", *arguments]), **result}
    result |= {"seeds": seeds, "versions": versions(), "commit": commit()}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, args.output / f"{args.name}.png")
    print(f"\n{table(result)}\nwrote {args.output / args.name}.json and .png")


if __name__ == "__main__":
    raise SystemExit(main())
