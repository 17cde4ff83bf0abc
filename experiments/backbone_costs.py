"""What the steps of `experiments.paper_backbones` cost: labels that the pool can give, GPU hours, memory and disk."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.evaluation.protocol import is_in_domain, new_token_limit
from drllm.evaluation.results import benchmarks
from drllm.manifests import MANIFEST, read_manifest
from drllm.paper import numbers
from drllm.search.quotas import apportion

# Card -> its peak per second in bf16 operations and in bytes of memory, and its memory.
CARDS = {
    "a100-40gb": (312e12, 1.555e12, 40e9),
    "a100-80gb": (312e12, 2.039e12, 80e9),
    "h100-80gb": (989e12, 3.35e12, 80e9),
}
DEFAULTS = {"card": "a100-40gb", "mfu": "0.3", "pass_ms": "40"}
# Distinct training questions per set: ARC's train splits, and those of the DART pool.
POOL = {
    "arc_easy": 2251, "arc_challenge": 1119, "dart-1": 564, "dart-2": 1348, "dart-3": 1592, "dart-4": 1690,
    "dart-5": 2301,
}  # fmt: skip
START_SECONDS = 120  # from the start of a process to its first batch
PROMPT_TOKENS = 130  # of a training question
SEARCH_ROWS, TRAIN_ROWS, EVAL_ROWS, ABLATION_ROWS = 128, 16, 32, 64  # the steps' default batches
WINDOWS, ROUTER_WIDTH = 8, 128
RECORD_BYTES = 3e3  # per searched or answered question
BF16 = 2  # bytes


@dataclass(frozen=True)
class Backbone:
    """A model of the paper, or a local one.

    Attributes:
        model, name: folder or Hub name, and short name.
        blocks, hidden_size, parameters: its size.
        kv_size: values of the keys of one token and block (heads times their width); those of its values are as many.
        inner_size, vocabulary: width of the MLPs, number of tokens.
        is_base: whether it is a base model.
    """

    model: str
    name: str
    blocks: int
    hidden_size: int
    parameters: float
    kv_size: int
    inner_size: int
    vocabulary: int
    is_base: bool = False

    @property
    def router_parameters(self) -> int:
        return self.blocks * (self.hidden_size * ROUTER_WIDTH + ROUTER_WIDTH + 3 * ROUTER_WIDTH + 3)


@dataclass(frozen=True)
class Machine:
    """What the estimates assume of a GPU.

    Attributes:
        card: one of `CARDS`.
        mfu: fraction of its peak that is reached.
        pass_ms: minimum time of a forward pass.
    """

    card: str
    mfu: float
    pass_ms: float

    @classmethod
    def of(cls, text: str) -> Machine:
        """Reads --assume, e.g. "card=a100-40gb,mfu=0.3"; what is missing is in `DEFAULTS`. UserError for bad ones."""
        given = dict(part.partition("=")[::2] for part in text.split(",") if part)
        if unknown := given.keys() - DEFAULTS.keys():
            raise UserError(f"--assume {sorted(unknown)[0]}: choose from {', '.join(DEFAULTS)}, e.g. mfu=0.3")
        values = DEFAULTS | given
        if values["card"] not in CARDS:
            raise UserError(f"--assume card={values['card']}: choose from {', '.join(CARDS)}")
        try:
            machine = cls(values["card"], float(values["mfu"]), float(values["pass_ms"]))
        except ValueError:
            raise UserError(f"--assume {text}: mfu and pass_ms must be numbers") from None
        if not (0 < machine.mfu <= 1 and 0 <= machine.pass_ms < math.inf):
            raise UserError(f"--assume {text}: mfu must lie in (0, 1], pass_ms must not be negative")
        return machine


@dataclass(frozen=True)
class Cost:
    """Seconds of one GPU, bytes on disk, peak bytes of a GPU's memory."""

    seconds: float = 0.0
    disk: float = 0.0
    memory: float = 0.0


@dataclass(frozen=True)
class Yields:
    """What searching a question gives: labels per visited question of each set, and inferences per simulation."""

    source: str
    labels: Mapping[str, float]
    inferences: float

    @classmethod
    def of(cls, folder: Path | None) -> Yields:
        """Those of Table 2, or of the finished label folder of an earlier run.

        Raises:
            UserError: a folder that is not finished, or that lacks a set.
        """
        sets = numbers.paper_sets()
        if folder is None:
            rows = numbers.paper_table(2).rows
            table = [
                {"set": name, **{key.lower(): cell["value"] for key, cell in rows[sets[name]].items()}} for name in sets
            ]
            return cls._of_rows("Table 2", [row | {"inferences": row["#inferences"]} for row in table], 50)
        manifest = read_manifest(folder)
        table = manifest.results.get("table2")
        if not table:
            raise UserError(f"--yields {folder / MANIFEST}: the run is not finished")
        if missing := sets.keys() - {row["set"] for row in table if row["visited"]}:
            raise UserError(f"--yields {folder}: no searched question of {', '.join(sorted(missing))}")
        rows = [row for row in table if row["set"] in sets]
        return cls._of_rows(str(folder), rows, manifest.arguments.get("num_simulations", 50))

    @classmethod
    def _of_rows(cls, source: str, rows: Sequence[Mapping[str, Any]], simulations: int) -> Yields:
        labels = {row["set"]: row["sampled"] / row["visited"] for row in rows}
        visited = sum(row["visited"] for row in rows)
        return cls(source, labels, sum(row["inferences"] for row in rows) / visited / simulations)


@dataclass(frozen=True)
class SetPlan:
    """Expected search of one set: its questions, those visited, labels wanted and found."""

    questions: int
    visited: int
    wanted: int
    labels: int


def plan_labels(yields: Yields, samples: int | None, limit: int | None) -> dict[str, SetPlan]:
    """Set -> its expected search; a set that cannot give its labels leaves them to the others, as in the search.

    Args:
        samples: labels wanted per set; None: those of Table 2.
        limit: most questions per set.
    """
    rows = numbers.paper_table(2).rows
    wanted = {name: samples or rows[shown]["Sampled"]["value"] for name, shown in numbers.paper_sets().items()}
    questions = {name: min(POOL[name], limit or POOL[name]) for name in wanted}
    room = {name: math.floor(questions[name] * yields.labels[name]) for name in wanted}
    labels = apportion(
        sum(wanted.values()), wanted, {name: min(wanted[name], most) for name, most in room.items()}, room
    )
    return {
        name: SetPlan(
            questions[name],
            questions[name] if found >= room[name] else math.ceil(found / yields.labels[name]),
            wanted[name],
            found,
        )
        for name, found in labels.items()
    }


def answer_tokens(task: dict[str, Any], args: argparse.Namespace) -> int:
    """Most new tokens per answer of a task of benchmarks.json under the protocol of `args`; 1 without generation."""
    limit = task["max_new_tokens"]
    if limit is None:
        return 1
    if is_in_domain(task["task"]):
        return args.dart_max_new_tokens if "dart" in task["task"] else limit[-1]
    return new_token_limit(args.gen_kwargs) or limit


class Costs:
    """Estimates for one backbone under the arguments of `experiments.paper_backbones`; see `assumptions`."""

    def __init__(self, backbone: Backbone, args: argparse.Namespace) -> None:
        self.backbone, self.args, self.machine = backbone, args, args.assume
        self.peak_flops, self.peak_bytes, self.capacity = CARDS[self.machine.card]
        self.yields = Yields.of(args.yields)
        self.sets = plan_labels(self.yields, args.samples, args.limit)
        self.visited = sum(part.visited for part in self.sets.values())
        self.labels = sum(part.labels for part in self.sets.values())
        self.inferences = self.visited * self.yields.inferences * args.num_simulations
        self.weights = BF16 * backbone.parameters

    def a_pass(self, tokens: float) -> float:
        """Seconds of a forward pass over `tokens` tokens: the slowest of products, reading weights and launching."""
        reading, products = self.weights / self.peak_bytes, 2 * self.backbone.parameters * tokens / self.peak_flops
        return max(max(reading, products) / self.machine.mfu, self.machine.pass_ms / 1000)

    def answers(self, rows: float, batch: int, prompt: float, new: float) -> float:
        """Seconds of answering `rows` prompts in batches, `new` tokens each (the prefill yields the first)."""
        batch = max(1, min(batch, rows))
        return rows / batch * (self.a_pass(batch * prompt) + max(new - 1, 0) * self.a_pass(batch))

    def running(self, rows: float, tokens: float, scored: float = 1) -> float:
        """Bytes of a batch: weights, a cache of every block, the widest activations, and logits of `scored` tokens."""
        backbone = self.backbone
        cache = backbone.blocks * 2 * backbone.kv_size * BF16
        widest = (2 * backbone.inner_size + 4 * backbone.hidden_size) * BF16
        logits = backbone.vocabulary * (BF16 + 4)  # and once more in float32
        return self.weights + rows * (tokens * (cache + widest) + scored * logits)

    def search(self) -> Cost:
        """The labels. Beside a batch, the default path's states of the open questions, which are two batches."""
        backbone, new = self.backbone, self.args.dart_max_new_tokens
        mean_tokens = 0.25 * 10 + 0.75 * new  # of the sampled labels of Table 2 a quarter is ARC's
        states = backbone.blocks * PROMPT_TOKENS * (backbone.hidden_size + 2 * backbone.kv_size) * BF16
        return Cost(
            self.answers(self.inferences, SEARCH_ROWS, PROMPT_TOKENS, mean_tokens),
            self.visited * RECORD_BYTES,
            self.running(SEARCH_ROWS, PROMPT_TOKENS + new) + 3 * SEARCH_ROWS * states,
        )

    def features(self) -> float:
        """Bytes of the stored features: questions x blocks x windows x width."""
        return self.labels * self.backbone.blocks * WINDOWS * self.backbone.hidden_size * BF16

    def training(self) -> Cost:
        """The routers."""
        backbone, labels = self.backbone, self.labels
        products = 6 * backbone.router_parameters * WINDOWS * labels / (self.peak_flops * self.machine.mfu)
        steps = self.args.num_epochs * max(labels / TRAIN_ROWS * self.machine.pass_ms / 1000, products)
        checkpoint = self.weights + 4 * backbone.router_parameters  # routers are saved alone, too
        return Cost(
            self.answers(labels, TRAIN_ROWS, PROMPT_TOKENS, 1) + steps,
            self.features() + checkpoint,
            self.running(TRAIN_ROWS, PROMPT_TOKENS) + 16 * backbone.router_parameters,
        )

    def evaluation(self, tasks: Sequence[dict[str, Any]], rows: int, runs: int = 2) -> Cost:
        """`runs` runs (base and router) of `tasks` of benchmarks.json, answers at full length."""
        seconds = disk = memory = 0.0
        for task in tasks:
            count, prompt, options = task["size"]
            count = min(count, self.args.limit or count)
            new = answer_tokens(task, self.args)
            seconds += runs * (self.answers(count, rows, prompt, new) + self.answers(count, rows, options, 1))
            disk += runs * count * RECORD_BYTES
            memory = max(memory, self.running(rows, prompt + options + new, max(1, options)))
        return Cost(seconds, disk, memory)

    def ablation(self, settings: int) -> Cost:
        """One ablation: features once, then each of `settings` trainings and its answers to the in-domain tests."""
        one, tasks = self.training(), [task for task in benchmarks() if is_in_domain(task["task"])]
        tested = self.evaluation(tasks, ABLATION_ROWS, 1)
        disk = self.features() + settings * (4 * self.backbone.router_parameters + tested.disk)
        return Cost(settings * (one.seconds + tested.seconds), disk, max(one.memory, tested.memory))

    def knob(self, points: int, questions: int) -> Cost:
        """Answers of `questions` training questions per set at each of `points` values of the knob."""
        new, rows = self.args.dart_max_new_tokens, EVAL_ROWS
        seconds = points * self.answers(len(POOL) * questions, rows, PROMPT_TOKENS, new)
        return Cost(seconds, RECORD_BYTES, self.running(rows, PROMPT_TOKENS + new))

    def latency(self, generations: int, rows: int, prompt: int, new: int) -> Cost:
        """`generations` generations of `new` tokens, each at the speed of its passes; two models in memory."""
        seconds = generations * (self.a_pass(rows * prompt) + new * self.a_pass(rows))
        return Cost(seconds, RECORD_BYTES, self.running(rows, prompt + new) + self.weights)


def assumptions(costs: Costs) -> str:
    """What the estimates assume, in words, after the expected labels of each set."""
    args, machine = costs.args, costs.machine
    limit = new_token_limit(args.gen_kwargs)
    out_of_domain = f"{limit:,} tokens" if limit else "as the tasks limit them"
    wanted = sum(part.wanted for part in costs.sets.values())
    parts = "; ".join(
        f"{name} {part.labels:,} of {part.wanted:,} from {part.visited:,} of {part.questions:,}"
        for name, part in costs.sets.items()
    )
    least, most = min(costs.yields.labels.values()), max(costs.yields.labels.values())
    labels = (
        f"Expected labels, at {least:.0%} to {most:.0%} per visited question ({costs.yields.source}): {costs.labels:,} "
        f"of {wanted:,} from {costs.visited:,} visited questions, {costs.inferences:,.0f} inferences ({parts}). The "
        "paper visits 24,330 questions, more than exist."
    )
    assumed = (
        f"Assumed (--assume): {machine.card} in bf16 at {machine.mfu:.0%} of {costs.peak_flops / 1e12:.0f} TFLOP/s and "
        f"of {costs.peak_bytes / 1e12:g} TB/s; 2 FLOPs per parameter and token; at least {machine.pass_ms:g} ms per "
        f"forward pass; {START_SECONDS} s to start a process. Search: {PROMPT_TOKENS} tokens per prompt, "
        f"{args.dart_max_new_tokens} per DART answer and 10 per ARC answer, {SEARCH_ROWS} rows per batch (step 1 "
        "itself takes as many as fit). Training: "
        f"{args.num_epochs} epochs on stored features (questions x blocks x {WINDOWS} windows x width x 2 bytes), the "
        "full checkpoint in bf16. Evaluation: base and router, sizes of eval_tasks/benchmarks.json, answers of full "
        f"length (out of domain: {out_of_domain}), {EVAL_ROWS} rows per batch. Memory: weights, cache, widest "
        "activations, logits, and the states that a search keeps, without fragmentation. Not included: skips, repeats, "
        "early ends, the states that a search reuses, reading the KV cache, the data sets. None of this was measured."
    )
    return "\n".join(textwrap.fill(text, width=116) for text in (labels, assumed))
