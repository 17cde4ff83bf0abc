"""The claim itself: on unseen questions, accuracy up and layers down, beside controls at matched layers.

    python -m drllm.claim --labels runs/demo/data --output results/claim.json

Every method answers the same test questions, graded and counted alike:

    base            every block once
    paper           routers trained as published on the labels of --labels, one run a seed
    effects         routers trained on paths that serve groups of like questions (`drllm/effects.py`), one run a seed;
                    the price of a block is chosen on validation questions: of those that save at least --save of the
                    blocks there, the one with the highest accuracy over --price_seeds
    static          one path for all: blocks skipped one after the other, each the one that costs the training
                    questions least
    influence       one path for all: the blocks with the least influence skipped (ShortGPT: cosine of input and output)
    early exit      one path for all: the last blocks skipped (LayerSkip's inference on a frozen base)
    random          the actions of the routers at their own rates, layer by layer, but drawn regardless of the question
    oracle          the search run on the test questions with their gold answers (the ceiling of a path a question)

Routers are compared question by question with the base, and with the static path of their layer count: between two
static paths, the mixture that has as many layers. The 95% intervals are over questions, of answers averaged over seeds.
No test question is used for anything but this comparison.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from drllm.checkpoints import join_routers, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.group_paths.margin_rewards import Answered, RoundStore, measure
from drllm.group_paths.paths import PathsOfGroups
from drllm.labels import read_labels
from drllm.processes import process_state
from drllm.provenance import commit, fingerprint, versions
from drllm.questions.prompts import Prompt
from drllm.questions.sets import expand_sets, load_questions
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.search.pool import SearchPool
from drllm.search.tree import SearchSettings
from drllm.training.features import pad_ids
from drllm.training.trainer import RouterTrainingConfig, train_routers
from experiments.ablations import MINIATURE_DATA, load_test_questions, routed_paths
from train_models import retrofit
from train_models.paths import EXECUTE, SKIP, default_path
from train_models.paths import Path as BlockPath

MINIATURE_MODEL = MINIATURE_DATA.parent / "model"
ROOT = Path(__file__).resolve().parent.parent
PRICES = (0.004, 0.006, 0.009)


@dataclass(frozen=True)
class Outcome:
    """How a method did on the test questions: right and layers a question, in their order."""

    right: list[float]
    layers: list[float]

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.right)

    @property
    def mean_layers(self) -> float:
        return statistics.mean(self.layers)

    @classmethod
    def average(cls, outcomes: Sequence[Outcome], weights: Sequence[float] | None = None) -> Outcome:
        """Question by question, over seeds or over the parts of a mixture."""
        weights = weights or [1 / len(outcomes)] * len(outcomes)

        def mixed(field: str) -> list[float]:
            columns = [getattr(outcome, field) for outcome in outcomes]
            return [sum(w * v for w, v in zip(weights, values, strict=True)) for values in zip(*columns, strict=True)]

        return cls(mixed("right"), mixed("layers"))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MINIATURE_MODEL))
    parser.add_argument("--data_dir", type=Path, default=MINIATURE_DATA)
    parser.add_argument("--sets", default="arc,dart")
    parser.add_argument("--labels", help="folder of labels, for the paper's way; left away without one")
    parser.add_argument(
        "--methods", help="paper, effects or both with a comma; default: both, without --labels effects"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train_questions", type=int, default=800, help="a set, for effects and static paths")
    parser.add_argument("--validation_questions", type=int, default=400, help="a set, further ones")
    parser.add_argument("--test_questions", type=int, help="a set; default: all")
    parser.add_argument("--groups", type=int, default=20, help="of effects: groups of like questions")
    parser.add_argument("--most_skips", type=int, default=4, help="of effects: skipped blocks of a group's path")
    parser.add_argument("--save", type=float, default=0.1, help="of effects: share of blocks to save, at least")
    parser.add_argument("--price_seeds", type=int, default=2, help="of effects: seeds that the price is chosen on")
    parser.add_argument("--static_questions", type=int, default=400, help="a set, to choose each static skip")
    parser.add_argument("--warmup_steps", type=int, default=100, help="of the paper's way, whose runs are short here")
    parser.add_argument("--oracle_questions", type=int, default=40, help="test questions a set for the oracle; 0: none")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--work_dir", default="runs/claim", help="of training runs")
    parser.add_argument("--output", type=Path, default=Path("results/claim.json"))
    arguments = parser.parse_args(argv)
    if arguments.methods is None:
        arguments.methods = "effects,paper" if arguments.labels else "effects"
    if unknown := set(arguments.methods.split(",")) - {"paper", "effects"}:
        raise UserError(f"--methods {arguments.methods}: {sorted(unknown)[0]!r} is none; there are paper and effects")
    if "paper" in arguments.methods and not arguments.labels:
        raise UserError("--methods paper needs the labels it trains on: --labels, a folder of data_generation.py")
    return arguments


class Comparison:
    """The models, the questions and everything measured on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.sets = expand_sets(arguments.sets)
        self.tokenizer = load_tokenizer(arguments.model)
        state = process_state(datetime.timedelta(days=1))
        self.routed = retrofit(arguments.model, dtype=torch.float32).eval().to(state.device)
        self.num_blocks = self.routed.config.num_hidden_layers
        self.engine = RolloutEngine(self.routed, self.tokenizer, arguments.batch_size, reuse_default_states=False)
        self.test = load_test_questions(self.engine, self.sets, arguments.data_dir, False, arguments.test_questions)
        self.base = Outcome([float(right) for right in self.test.base_right], self._layers(self._everywhere(self.test)))
        self.train, self.validation = self._training_questions()
        self._check_disjoint()
        # What a stopped run measured is not measured again.
        self.store = RoundStore(Path(arguments.work_dir) / "measured", fingerprint(self.routed), state)

    def _everywhere(self, test) -> list[BlockPath]:
        return [default_path(self.num_blocks)] * len(test.prompts)

    @staticmethod
    def _layers(paths: Sequence[BlockPath]) -> list[float]:
        return [float(sum(path)) for path in paths]

    def _training_questions(self) -> tuple[list[Answered], list[Answered]]:
        """(training, validation) questions of the training files."""
        parts: tuple[list[Answered], list[Answered]] = ([], [])
        cut, more = self.arguments.train_questions, self.arguments.validation_questions
        for name in self.sets:
            questions = load_questions(name, "train", self.arguments.data_dir, cut + more)
            if len(questions) < cut + more:
                raise UserError(
                    f"{name} has {len(questions)} training questions; --train_questions and --validation_questions ask "
                    f"for {cut + more}"
                )
            answered = [Answered.of(Prompt.of(each, self.tokenizer, False), self.tokenizer) for each in questions]
            parts[0].extend(answered[:cut])
            parts[1].extend(answered[cut:])
        return parts

    def _check_disjoint(self) -> None:
        test = {prompt.question.id for prompt in self.test.prompts}
        shared = test & {each.prompt.question.id for each in (*self.train, *self.validation)}
        if shared:
            raise UserError(f"{len(shared)} test questions are also training questions, {sorted(shared)[0]} for one")

    def answer(self, prompts: Sequence[Prompt], paths: Sequence[BlockPath]) -> Outcome:
        """Greedy answers along `paths`, graded."""
        requests = [Request(prompt, path) for prompt, path in zip(prompts, paths, strict=True)]
        right = [float(rollout.is_right) for rollout in self.engine.respond(requests)]
        for prompt in prompts:
            self.engine.forget(prompt.question)
        return Outcome(right, self._layers(paths))

    def decide(self, routed, prompts: Sequence[Prompt]) -> list[BlockPath]:
        return routed_paths(routed, prompts, self.arguments.batch_size)

    # Routers

    def paper(self) -> tuple[list[Outcome], list[list[BlockPath]], dict]:
        """Published training: (an outcome a seed, their paths, how labels and routers did on training questions)."""
        outcomes, decisions, in_training = [], [], []
        asked, labels = self._labelled()
        for seed in range(self.arguments.seeds):
            config = RouterTrainingConfig(
                data=(self.arguments.labels,),
                model_id=self.arguments.model,
                run_name=f"paper-{seed}",
                output_dir=self.arguments.work_dir,
                warmup_steps=self.arguments.warmup_steps,
                seed=seed,
            )
            train_routers(config)
            routed = join_routers(config.checkpoint / "routers", self.arguments.model).to(self.routed.device)
            decisions.append(self.decide(routed, self.test.prompts))
            outcomes.append(self.answer(self.test.prompts, decisions[-1]))
            say(f"paper, seed {seed}", outcomes[-1])
            in_training.append(self.answer(asked, self.decide(routed, asked)))
        isolated = {
            "base": self.answer(asked, [default_path(self.num_blocks)] * len(asked)),
            "labels followed": self.answer(asked, labels),
            "routers": Outcome.average(in_training),
        }
        return outcomes, decisions, {"on_training_questions": _means(isolated)}

    def _labelled(self) -> tuple[list[Prompt], list[BlockPath]]:
        """The questions of --labels and their paths."""
        found = read_labels(Path(self.arguments.labels))
        chat = bool(found.manifest["chat_template"])
        paths = {(row["set"], row["question_id"]): tuple(row["optimal_layer_config"]) for row in found.rows}
        questions = [
            question
            for name in sorted({set_name for set_name, _ in paths})
            for question in load_questions(name, "train", self.arguments.data_dir)
            if (name, question.id) in paths
        ]
        prompts = [Prompt.of(question, self.tokenizer, chat) for question in questions]
        return prompts, [paths[question.set, question.id] for question in questions]

    def effects(self) -> tuple[list[Outcome], list[list[BlockPath]], dict]:
        """Routers on the paths of groups: (an outcome a seed, their paths, how price and labels did)."""
        arguments, batch_size = self.arguments, self.arguments.batch_size
        default = [default_path(self.num_blocks)] * len(self.train)
        grown = PathsOfGroups(self.routed, self.train, arguments.groups, arguments.most_skips, batch_size, self.store)
        train_prompts = [each.prompt for each in self.train]
        prompts = [each.prompt for each in self.validation]
        validated: dict[float, Outcome] = {}
        trained: dict[tuple[float, int], dict] = {}  # routers by price and seed

        def use_routers(price: float, seed: int) -> None:
            """Leaves these routers in the model, trained once."""
            routers = self.routed.model.routers
            if (price, seed) not in trained:
                grown.train_routers(price, seed)
                trained[price, seed] = copy.deepcopy(routers.state_dict())
            routers.load_state_dict(trained[price, seed])

        for price in PRICES:
            found = []
            for seed in range(min(arguments.price_seeds, arguments.seeds)):
                use_routers(price, seed)
                found.append(self.answer(prompts, self.decide(self.routed, prompts)))
                say(f"effects, price {price}, seed {seed}, validation", found[-1])
            validated[price] = Outcome.average(found)
        # Chosen by validation alone; the test questions are answered once, at that price.
        saving = [p for p in PRICES if validated[p].mean_layers <= (1 - arguments.save) * self.num_blocks]
        chosen = max(saving or PRICES, key=lambda price: validated[price].accuracy)
        outcomes, decisions, in_training = [], [], []
        for seed in range(arguments.seeds):
            use_routers(chosen, seed)
            decisions.append(self.decide(self.routed, self.test.prompts))
            outcomes.append(self.answer(self.test.prompts, decisions[-1]))
            say(f"effects, price {chosen}, seed {seed}", outcomes[-1])
            in_training.append(self.answer(train_prompts, self.decide(self.routed, train_prompts)))
        validation_base = self.answer(prompts, default[:1] * len(prompts))
        isolated = {
            "base": self.answer(train_prompts, default),
            "labels followed": self.answer(train_prompts, grown.labels(chosen)),
            "routers": Outcome.average(in_training),
        }
        details = {
            "price": chosen,
            "validation_questions": len(self.validation),
            "validation_base": validation_base.accuracy,
            "validation": [
                {"price": price, "accuracy": outcome.accuracy, "layers": outcome.mean_layers}
                for price, outcome in validated.items()
            ],
            "on_training_questions": _means(isolated),
            "groups": [
                {
                    "questions": int((grown.groups == group).sum()),
                    "paths": [{"path": list(each.path), "reward": each.reward} for each in chain],
                }
                for group, chain in enumerate(grown.chains)
            ],
        }
        return outcomes, decisions, details

    # Controls

    def static(self, most: int) -> list[tuple[BlockPath, Outcome]]:
        """Paths of 0 to `most` skips, each the former and the skip that costs the training questions least."""
        per_set = {name: [e for e in self.train if e.prompt.question.set == name] for name in self.sets}
        questions = [each for part in per_set.values() for each in part[: self.arguments.static_questions]]
        path, found = default_path(self.num_blocks), []
        for _ in range(most + 1):
            found.append((path, self._one_path(path)))
            say(f"static {list(path)}", found[-1][1])
            paths, batch_size = [path] * len(questions), self.arguments.batch_size
            costs = measure(self.routed, questions, paths, batch_size, with_windows=False, store=self.store)
            mean = costs.rewards[:, :, SKIP].mean(0)
            mean[[block for block, visits in enumerate(path) if visits == SKIP]] = -math.inf
            block = int(mean.argmax())
            path = (*path[:block], SKIP, *path[block + 1 :])
        return found

    @torch.inference_mode()
    def influence(self, most: int) -> list[tuple[BlockPath, Outcome]]:
        """The blocks that change their input least, skipped one after the other (ShortGPT's block influence)."""
        similar = torch.zeros(self.num_blocks)
        real: torch.Tensor | None = None

        def compare(layer, arguments, output) -> None:
            block = layer.self_attn.layer_idx
            similar[block] += torch.cosine_similarity(arguments[0][real], output[real], dim=-1).sum().item()

        hooks = [layer.register_forward_hook(compare) for layer in self.routed.model.layers]
        prompts = [each.prompt.input_ids for each in self.train[:: max(1, len(self.train) // 512)]]
        for start in range(0, len(prompts), self.arguments.batch_size):
            batch = pad_ids(prompts[start : start + self.arguments.batch_size], 0, self.routed.device)
            real = batch["attention_mask"].bool()
            self.routed.model(**batch, layer_indices=list(range(self.num_blocks)), use_cache=False)
        for hook in hooks:
            hook.remove()
        order = similar.argsort(descending=True).tolist()
        found = []
        for count in range(1, most + 1):
            path = tuple(SKIP if block in order[:count] else EXECUTE for block in range(self.num_blocks))
            found.append((path, self._one_path(path)))
            say(f"influence {list(path)}", found[-1][1])
        return found

    def early_exit(self, most: int) -> list[tuple[BlockPath, Outcome]]:
        """The last blocks skipped."""
        found = []
        for count in range(1, most + 1):
            path = (EXECUTE,) * (self.num_blocks - count) + (SKIP,) * count
            found.append((path, self._one_path(path)))
            say(f"early exit {list(path)}", found[-1][1])
        return found

    def at_random(self, decisions: Sequence[list[BlockPath]]) -> list[Outcome]:
        """For each seed's decisions, actions at the same rates a layer, drawn regardless of the question."""
        outcomes = []
        for seed, paths in enumerate(decisions):
            generator = random.Random(seed)
            columns = list(zip(*paths, strict=True))
            shuffled = [generator.sample(column, len(column)) for column in columns]  # the rates, exactly
            outcomes.append(self.answer(self.test.prompts, list(zip(*shuffled, strict=True))))
            say(f"random, seed {seed}", outcomes[-1])
        return outcomes

    def oracle(self, a_set: int) -> dict:
        """The published search on test questions with their gold answers."""
        prompts = []
        for name in self.sets:
            prompts += [prompt for prompt in self.test.prompts if prompt.question.set == name][:a_set]
        pool = SearchPool(self.engine, SearchSettings(), 0, 4 * self.arguments.batch_size)
        right, layers, base = [], [], []
        for searched in pool.search(prompts):
            result = searched.result
            best = result.best_path or default_path(self.num_blocks)
            base.append(float(result.base_correct))
            right.append(float(result.base_correct or result.best_path is not None))
            layers.append(float(sum(best)))
        outcome = Outcome(right, layers)
        say("oracle", outcome)
        return {
            "questions": len(prompts),
            "accuracy": outcome.accuracy,
            "layers": outcome.mean_layers,
            "base_accuracy": statistics.mean(base),
        }

    def _one_path(self, path: BlockPath) -> Outcome:
        return self.answer(self.test.prompts, [path] * len(self.test.prompts))


def _means(outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
    return {name: {"accuracy": each.accuracy, "layers": each.mean_layers} for name, each in outcomes.items()}


def say(name: str, outcome: Outcome) -> None:
    print(f"{name}: accuracy {outcome.accuracy:.2%}, layers {outcome.mean_layers:.2f}", file=sys.stderr, flush=True)


def mixture(controls: Sequence[Outcome], layers: float) -> Outcome | None:
    """The mixture of two neighbouring controls with `layers` layers on average; None outside of their range."""
    ordered = sorted(controls, key=lambda outcome: outcome.mean_layers)
    for below, above in pairwise(ordered):
        if below.mean_layers <= layers <= above.mean_layers:
            width = above.mean_layers - below.mean_layers
            share = (layers - below.mean_layers) / width if width else 1.0
            return Outcome.average([below, above], [1 - share, share])
    return None


def difference(one: Outcome, other: Outcome) -> dict[str, float]:
    """Paired difference of accuracy in points, with its 95% interval over questions (normal)."""
    pairs = [100 * (a - b) for a, b in zip(one.right, other.right, strict=True)]
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    return {"points": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def summary(name: str, outcomes: Sequence[Outcome], base: Outcome, controls: Sequence[Outcome]) -> dict:
    """A row of the table: means over seeds, spread, and the paired differences."""
    together = Outcome.average(outcomes)
    row = {
        "method": name,
        "seeds": len(outcomes),
        "accuracy": together.accuracy,
        "accuracy_std": statistics.stdev([o.accuracy for o in outcomes]) if len(outcomes) > 1 else 0.0,
        "layers": together.mean_layers,
        "layers_std": statistics.stdev([o.mean_layers for o in outcomes]) if len(outcomes) > 1 else 0.0,
        "against_base": difference(together, base),
    }
    static = mixture(controls, together.mean_layers)
    if static is not None:
        row["against_static"] = difference(together, static)
    return row


def per_set(comparison: Comparison, outcome: Outcome) -> dict[str, dict[str, float]]:
    by_set: dict[str, dict[str, float]] = {}
    for name in comparison.sets:
        places = [i for i, prompt in enumerate(comparison.test.prompts) if prompt.question.set == name]
        by_set[name] = {
            "base_accuracy": statistics.mean(comparison.base.right[i] for i in places),
            "accuracy": statistics.mean(outcome.right[i] for i in places),
            "layers": statistics.mean(outcome.layers[i] for i in places),
        }
    return by_set


def table(result: dict) -> str:
    """The rows as Markdown."""

    def interval(value: dict | None) -> str:
        return "" if value is None else f"{value['points']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"

    lines = [
        "| method | accuracy | layers | points against base | points against static of as many layers |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        several = row["seeds"] > 1
        accuracy = f"{100 * row['accuracy']:.2f}" + (f" ± {100 * row['accuracy_std']:.2f}" if several else "")
        layers = f"{row['layers']:.2f}" + (f" ± {row['layers_std']:.2f}" if several else "")
        cells = [row["method"], accuracy, layers, interval(row["against_base"]), interval(row.get("against_static"))]
        lines.append("| " + " | ".join(cells) + " |")
    if result["oracle"]:
        oracle = result["oracle"]
        lines.append(
            f"\nOracle on {oracle['questions']} of these questions: {100 * oracle['accuracy']:.1f} at "
            f"{oracle['layers']:.2f} layers (base there: {100 * oracle['base_accuracy']:.1f})."
        )
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Accuracy against layers; error bars are 95% intervals of the paired difference from the base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.2))
    styles = {"base": "k*", "paper": "ks", "effects": "ko", "static": "k^", "influence": "kv", "early exit": "kx"}
    styles["random"] = "k+"
    for kind, style in styles.items():
        rows = [row for row in result["rows"] if row["method"].split(":")[0] == kind]
        if rows:
            errors = [(row["against_base"]["high"] - row["against_base"]["low"]) / 2 for row in rows]
            axes.errorbar(
                [row["layers"] for row in rows],
                [100 * row["accuracy"] for row in rows],
                errors,
                fmt=style,
                linestyle=":" if len(rows) > 1 else "none",
                linewidth=0.8,
                capsize=2,
                label=kind,
                markerfacecolor="none" if kind in ("static", "influence") else "black",
            )
    axes.set(xlabel="block applications a forward pass", ylabel="accuracy (%)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@main_guard
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    comparison = Comparison(arguments)
    say(f"base on {len(comparison.test.prompts)} test questions", comparison.base)
    static = comparison.static(most=3)
    controls = [outcome for _, outcome in static]
    groups: list[tuple[str, list[Outcome]]] = [("base", [comparison.base])]
    groups += [(f"static: {len(path) - sum(path)} skipped", [outcome]) for path, outcome in static[1:]]
    for name, found in (("influence", comparison.influence(2)), ("early exit", comparison.early_exit(2))):
        groups += [(f"{name}: {count} skipped", [outcome]) for count, (_, outcome) in enumerate(found, 1)]
    sets, details = {}, {}
    for name in arguments.methods.split(","):
        outcomes, decisions, details[name] = {"effects": comparison.effects, "paper": comparison.paper}[name]()
        groups += [(name, outcomes), (f"random: rates of {name}", comparison.at_random(decisions))]
        sets[name] = per_set(comparison, Outcome.average(outcomes))
    result = {
        "command": "python -m drllm.claim " + " ".join(sys.argv[1:] if argv is None else argv),
        # As a reader of the repository would type them.
        "arguments": {key: str(value).removeprefix(f"{ROOT}/") for key, value in vars(arguments).items()},
        "commit": commit(),
        "versions": versions(),
        "test_questions": len(comparison.test.prompts),
        "static_paths": [list(path) for path, _ in static],
        "search": asdict(SearchSettings()),
        "labels": read_labels(Path(arguments.labels)).manifest.get("arguments") if arguments.labels else None,
        "rows": [summary(name, members, comparison.base, controls) for name, members in groups],
        "sets": sets,
        "details": details,
        "oracle": comparison.oracle(arguments.oracle_questions) if arguments.oracle_questions else None,
    }
    result["seconds"] = time.perf_counter() - start
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.output.with_suffix(".png"))
    print(table(result))
    print(f"\n{arguments.output}\n{arguments.output.with_suffix('.png')}")


if __name__ == "__main__":
    raise SystemExit(main())
