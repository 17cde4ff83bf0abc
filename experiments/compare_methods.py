"""Compares routers with the base model and with controls at equal layers, on unseen questions.

    python -m experiments.compare_methods --labels runs/demo/data --output results/compare_methods.json

Every method answers the same test questions, graded and counted alike:

    base            every block once
    paper           routers trained as published on the labels of --labels, one run per seed
    published, reward shared by groups
                    the same training on the labels of --group_labels (extensions.groups.search), one run per seed
    group paths     routers trained on paths that serve groups of similar questions (drllm/group_paths), one run per
                    seed; the price of a block is chosen on validation questions: of the prices that save at least
                    --save of the blocks there, the one with the highest accuracy over --price_seeds
    static          one path for all: blocks skipped one after the other, each the one that costs the training
                    questions least
    influence       one path for all: the blocks with the least influence skipped (ShortGPT: cosine of input and output)
    early exit      one path for all: the last blocks skipped (LayerSkip's inference on a frozen base)
    random          the actions of the routers at their own rates per layer, drawn regardless of the question
    known paths     with --known_paths: the path that the base was trained along for questions of that kind, and routers
                    that imitate these paths; every row then has the share of their gain that its method recovers
    oracle          the search run on the test questions with their gold answers (the ceiling of one path per question)

Routers are compared question by question with the base, and with static paths of as many layers: between two static
paths, the mixture that has as many. The 95% intervals are over questions, of answers averaged over seeds. No test
question is used for anything but this comparison. Run the same command to resume.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from drllm.arguments import check_ranges
from drllm.checkpoints import load_routed, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.evaluation.experiment_figures import draw_methods
from drllm.evaluation.method_report import methods_table
from drllm.evaluation.outcomes import Outcome, answer_along, load_test_questions, method_row, share_recovered
from drllm.files import check_output_file, check_output_folder
from drllm.group_paths.margin_rewards import Answered, MarginRewards, RoundStore
from drllm.group_paths.paths import PathsOfGroups
from drllm.labels import LabelSet, read_labels
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL, ROOT
from drllm.processes import process_state
from drllm.provenance import command_line, fingerprint, write_result
from drllm.questions.prompts import Prompt, wants_chat_template
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import expand_sets, load_questions
from drllm.rivals import BlockInfluence, EarlyExit, GreedySkips, random_paths
from drllm.rollouts.engine import RolloutEngine
from drllm.rollouts.routed_paths import routed_paths
from drllm.rollouts.scores import ScoreStore
from drllm.search.pool import SearchPool
from drllm.search.tree import SearchSettings
from drllm.training.trainer import RouterTrainingConfig
from experiments.known_paths import KnownPaths, label_quality, train_on_known_paths
from experiments.published_training import labelled_prompts, response_format_of, train_published
from train_models.paths import Path as BlockPath
from train_models.paths import default_path

PROGRAM = "python -m experiments.compare_methods"
PRICES = (0.004, 0.006, 0.009)
STATIC_SKIPS, RIVAL_SKIPS = 3, 2
METHODS = {  # of --methods -> name in the table
    "paper": "paper",
    "group_paths": "group paths",
    "group_search": "published, reward shared by groups",
}
LABELS_OF = {"paper": "labels", "group_search": "group_labels"}  # methods that train on labels -> their argument


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(MINIATURE_MODEL), help="folder or Hub name; default: the miniature")
    add("--data_dir", type=Path, default=MINIATURE_DATA, help="question files; default: the miniature's")
    add("--sets", default="arc,dart", help="question sets and groups, comma-separated")
    add("--labels", help="folder of labels for the method 'paper', which is left out without it")
    add("--group_labels", help="folder of labels of extensions.groups.search, for the method 'group_search'")
    add("--methods", help=", ".join(METHODS) + ", comma-separated; default: all that are possible")
    add("--seeds", type=int, default=5, help="training runs per method")
    add("--train_questions", type=int, default=800, help="per set, for group paths and static paths")
    add("--validation_questions", type=int, default=400, help="per set, further ones")
    add("--test_questions", type=int, help="per set; default: all")
    add("--groups", type=int, default=20, help="group paths: groups of similar questions")
    add("--most_skips", type=int, default=4, help="group paths: skipped blocks of a group's path")
    add("--save", type=float, default=0.1, help="group paths: least share of blocks to save")
    add("--price_seeds", type=int, default=2, help="group paths: seeds that the price is chosen on")
    add("--static_questions", type=int, default=400, help="per set, to choose each static skip")
    add("--num_epochs", type=int, default=25, help="paper, group_search: epochs of the training")
    add("--warmup_steps", type=int, default=500, help="paper, group_search: warm-up steps of the training")
    add("--known_paths", type=Path, help="JSON, kind of question -> path, of a base trained along known paths")
    add("--oracle_questions", type=int, default=40, help="test questions per set for the oracle; 0: none")
    add("--batch_size", type=int, default=64, help="questions per forward pass")
    add("--work_dir", type=Path, default=Path("runs/compare_methods"), help="training runs and what was measured")
    add("--output", type=Path, default=Path("results/compare_methods.json"), help="JSON file; .md and .png beside it")
    arguments = parser.parse_args(argv)
    if arguments.methods is None:
        with_labels = [method for method, folder in LABELS_OF.items() if getattr(arguments, folder)]
        arguments.methods = ",".join(["group_paths", *with_labels])
    arguments.methods = arguments.methods.replace("effects", "group_paths").split(",")  # its former name
    if unknown := set(arguments.methods) - METHODS.keys():
        raise UserError(f"--methods: {sorted(unknown)[0]!r} is not a method; choose from {', '.join(METHODS)}")
    for method, folder in LABELS_OF.items():
        if method in arguments.methods and not getattr(arguments, folder):
            program = {"paper": "data_generation.py", "group_search": "extensions.groups.search"}[method]
            raise UserError(f"--methods {method} needs the labels it trains on: --{folder}, a folder of {program}")
    some, any_number = (1, math.inf), (0, math.inf)
    check_ranges(
        arguments,
        **dict.fromkeys(("seeds", "price_seeds", "train_questions", "validation_questions"), some),
        **dict.fromkeys(("groups", "static_questions", "num_epochs", "batch_size"), some),
        **dict.fromkeys(("most_skips", "warmup_steps", "oracle_questions"), any_number),
        test_questions=(2, math.inf),
        save=(0, 1),
    )
    check_output_file(arguments.output, "--output")
    for suffix in (".png", ".md"):
        check_output_file(arguments.output.with_suffix(suffix), "--output")
    check_output_folder(arguments.work_dir, "--work_dir")
    return arguments


def report(name: str, outcome: Outcome) -> Outcome:
    """`outcome`, after one line about it on stderr."""
    print(f"{name}: accuracy {outcome.accuracy:.2%}, layers {outcome.mean_layers:.2f}", file=sys.stderr, flush=True)
    return outcome


class Comparison:
    """The models, the questions and everything measured on them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.sets = expand_sets(arguments.sets)
        self.labels = {  # of the methods that train on labels
            method: read_labels(getattr(arguments, folder))
            for method, folder in LABELS_OF.items()
            if getattr(arguments, folder) is not None
        }
        self.tokenizer = load_tokenizer(arguments.model)
        self.chat = wants_chat_template("auto", arguments.model, self.tokenizer)
        formats = [(bool(of.manifest["chat_template"]), response_format_of(of)) for of in self.labels.values()]
        if formats and formats[0] != formats[-1]:
            raise UserError("the labels of --labels and --group_labels were made with different prompts or graders")
        self.chat, self.response_format = formats[0] if formats else (self.chat, ResponseFormat())
        state = process_state(datetime.timedelta(days=1))
        self.routed = load_routed(arguments.model, torch.float32, None, {}).eval().to(state.device)
        self.num_blocks = self.routed.config.num_hidden_layers
        self.train, self.validation = self._training_questions()
        self.engine = RolloutEngine(self.routed, self.tokenizer, arguments.batch_size, reuse_default_states=False)
        key = {"model_fingerprint": fingerprint(self.routed), "dtype": "float32", "chat_template": self.chat}
        if self.response_format != ResponseFormat():
            key["response_format"] = self.response_format.as_dict()
        self.answers = ScoreStore(arguments.work_dir / "answers", key)
        self.test = load_test_questions(
            self.engine,
            self.sets,
            arguments.data_dir,
            self.chat,
            arguments.test_questions,
            self.response_format,
            self.answers,
        )
        report(f"base on {len(self.test.prompts)} test questions", self.test.base)
        self._check_disjoint()
        self.store = RoundStore(arguments.work_dir / "measured", fingerprint(self.routed), state)
        self.known = None
        if arguments.known_paths is not None:
            self.known = KnownPaths(arguments.known_paths, arguments.data_dir, self.num_blocks)

    def _training_questions(self) -> tuple[list[Answered], list[Answered]]:
        """(training, validation) questions of the training files."""
        train: list[Answered] = []
        validation: list[Answered] = []
        count = self.arguments.train_questions
        total = count + self.arguments.validation_questions
        for name in self.sets:
            questions = load_questions(name, "train", self.arguments.data_dir, total)
            if len(questions) < total:
                raise UserError(
                    f"{name} has {len(questions)} training questions; --train_questions and --validation_questions ask "
                    f"for {total}"
                )
            prompts = [Prompt.of(question, self.tokenizer, self.chat, self.response_format) for question in questions]
            answered = [Answered.of(prompt, self.tokenizer) for prompt in prompts]
            train.extend(answered[:count])
            validation.extend(answered[count:])
        return train, validation

    def _check_disjoint(self) -> None:
        test = {prompt.question.id for prompt in self.test.prompts}
        shared = test & {answered.prompt.question.id for answered in (*self.train, *self.validation)}
        if shared:
            raise UserError(f"{len(shared)} test questions are also training questions, e.g. {sorted(shared)[0]}")

    def answer(self, prompts: Sequence[Prompt], paths: Sequence[BlockPath]) -> Outcome:
        """Greedy answers along `paths`, one path per prompt, graded."""
        return answer_along(self.engine, prompts, paths, self.answers)

    def answer_test(self, name: str, path: BlockPath) -> Outcome:
        """The test questions along one path for all, reported as `name`."""
        return report(f"{name} {list(path)}", self.answer(self.test.prompts, [path] * len(self.test.prompts)))

    def decide(self, routed, prompts: Sequence[Prompt]) -> list[BlockPath]:
        """The paths that the routers of `routed` decide on."""
        return routed_paths(routed, prompts, self.arguments.batch_size)

    def static(self) -> tuple[list[BlockPath], dict[str, list[Outcome]]]:
        """(the greedy static paths, outcomes of the static rivals by name; element k has k blocks skipped)."""
        batch_size, chosen = self.arguments.batch_size, []
        for name in self.sets:
            members = [answered for answered in self.train if answered.prompt.question.set == name]
            chosen += members[: self.arguments.static_questions]
        greedy = GreedySkips(batch_size, self.store)
        greedy_paths = greedy.fit(self.routed, chosen, STATIC_SKIPS)
        outcomes = {greedy.name: [self.answer_test(greedy.name, path) for path in greedy_paths]}
        for rival in (BlockInfluence(batch_size), EarlyExit()):
            paths = rival.fit(self.routed, self.train, RIVAL_SKIPS)
            skipping = [self.answer_test(rival.name, path) for path in paths[1:]]
            outcomes[rival.name] = [self.test.base, *skipping]
        return greedy_paths, outcomes

    def published(self, method: str) -> tuple[list[Outcome], list[list[BlockPath]], dict]:
        """Published training: (outcomes and paths per seed, how labels and routers did on training questions).

        Args:
            method: "paper" or "group_search", which have labels.
        """
        arguments = self.arguments
        outcomes, decisions, in_training = [], [], []
        prompts, labels = labelled_prompts(self.labels[method], arguments.data_dir, self.tokenizer)
        for seed in range(arguments.seeds):
            config = RouterTrainingConfig(
                data=(getattr(arguments, LABELS_OF[method]),),
                model_id=arguments.model,
                run_name=f"{method}-{seed}",
                output_dir=str(arguments.work_dir),
                num_epochs=arguments.num_epochs,
                warmup_steps=arguments.warmup_steps,
                seed=seed,
            )
            routed = train_published(config).to(self.routed.device)
            decisions.append(self.decide(routed, self.test.prompts))
            outcomes.append(report(f"{method}, seed {seed}", self.answer(self.test.prompts, decisions[-1])))
            in_training.append(self.answer(prompts, self.decide(routed, prompts)))
        details = self._on_training_questions(prompts, labels, in_training)
        return outcomes, decisions, {"on_training_questions": details}

    def group_paths(self) -> tuple[list[Outcome], list[list[BlockPath]], dict]:
        """Routers on the paths of groups: (outcomes and paths per seed, how price and labels did)."""
        arguments = self.arguments
        rewards = MarginRewards(self.routed, self.train, arguments.batch_size, self.store)
        paths_of_groups = PathsOfGroups(rewards, arguments.groups, arguments.most_skips)
        trained: dict[tuple[float, int], dict] = {}  # routers by price and seed

        def use_routers(price: float, seed: int) -> None:
            """Leaves these routers in the model; trains them at the first call."""
            routers = self.routed.model.routers
            if (price, seed) not in trained:
                paths_of_groups.train_routers(price, seed)
                trained[price, seed] = copy.deepcopy(routers.state_dict())
            routers.load_state_dict(trained[price, seed])

        price, details = self._choose_price(use_routers)
        prompts = [answered.prompt for answered in self.train]
        outcomes, decisions, in_training = [], [], []
        for seed in range(arguments.seeds):
            use_routers(price, seed)
            decisions.append(self.decide(self.routed, self.test.prompts))
            outcomes.append(
                report(f"group paths, price {price}, seed {seed}", self.answer(self.test.prompts, decisions[-1]))
            )
            in_training.append(self.answer(prompts, self.decide(self.routed, prompts)))
        details["on_training_questions"] = self._on_training_questions(
            prompts, paths_of_groups.labels(price), in_training
        )
        details["groups"] = [
            {
                "questions": int((paths_of_groups.groups == group).sum()),
                "paths": [{"path": list(member.path), "reward": member.reward} for member in chain],
            }
            for group, chain in enumerate(paths_of_groups.chains)
        ]
        return outcomes, decisions, details

    def _choose_price(self, use_routers) -> tuple[float, dict]:
        """(the price chosen on validation questions alone, how all prices did there)."""
        arguments = self.arguments
        prompts = [answered.prompt for answered in self.validation]
        validated: dict[float, Outcome] = {}
        for price in PRICES:
            outcomes = []
            for seed in range(min(arguments.price_seeds, arguments.seeds)):
                use_routers(price, seed)
                outcome = self.answer(prompts, self.decide(self.routed, prompts))
                outcomes.append(report(f"group paths, price {price}, seed {seed}, validation", outcome))
            validated[price] = Outcome.average(outcomes)
        most_layers = (1 - arguments.save) * self.num_blocks
        saving = [price for price in PRICES if validated[price].mean_layers <= most_layers]
        chosen = max(saving or PRICES, key=lambda price: validated[price].accuracy)
        return chosen, {
            "price": chosen,
            "validation_questions": len(prompts),
            "validation_base": self.answer(prompts, [default_path(self.num_blocks)] * len(prompts)).accuracy,
            "validation": [
                {"price": price, "accuracy": outcome.accuracy, "layers": outcome.mean_layers}
                for price, outcome in validated.items()
            ],
        }

    def _on_training_questions(
        self, prompts: Sequence[Prompt], labels: Sequence[BlockPath], routers: Sequence[Outcome]
    ) -> dict[str, dict[str, float]]:
        """Accuracy and layers of the base, of the labels themselves, and of the routers trained on them."""
        outcomes = {
            "base": self.answer(prompts, [default_path(self.num_blocks)] * len(prompts)),
            "labels followed": self.answer(prompts, labels),
            "routers": Outcome.average(routers),
        }
        return {name: {"accuracy": o.accuracy, "layers": o.mean_layers} for name, o in outcomes.items()}

    def known_paths(self) -> tuple[Outcome, list[Outcome]]:
        """(the known paths themselves, per seed the routers that imitate them) on the test questions."""
        followed = self.answer(self.test.prompts, self.known.of(self.test.prompts, "test"))
        report("known paths", followed)
        rewards = MarginRewards(self.routed, self.train, self.arguments.batch_size, self.store)
        paths = self.known.of([answered.prompt for answered in self.train], "train")
        imitating = []
        for seed in range(self.arguments.seeds):
            train_on_known_paths(rewards, paths, seed)
            outcome = self.answer(self.test.prompts, self.decide(self.routed, self.test.prompts))
            imitating.append(report(f"routers on known paths, seed {seed}", outcome))
        return followed, imitating

    def label_quality(self, labels: LabelSet) -> dict:
        """See `known_paths.label_quality`."""
        prompts, paths = labelled_prompts(labels, self.arguments.data_dir, self.tokenizer)
        kinds = [self.known.kind_of(prompt.question, "train") for prompt in prompts]
        known = self.known.of(prompts, "train")
        return label_quality(paths, kinds, known, lambda given: self.answer(prompts, given))

    def random(self, name: str, decisions: Sequence[list[BlockPath]]) -> list[Outcome]:
        """Random paths at the rates of each seed's decisions."""
        return [
            report(f"random, rates of {name}, seed {seed}", self.answer(self.test.prompts, random_paths(paths, seed)))
            for seed, paths in enumerate(decisions)
        ]

    def oracle(self, per_set: int) -> dict:
        """The published search on `per_set` test questions of each set, with their gold answers."""
        prompts = []
        for name in self.sets:
            prompts += [prompt for prompt in self.test.prompts if prompt.question.set == name][:per_set]
        pool = SearchPool(self.engine, SearchSettings(), 0, 4 * self.arguments.batch_size)
        results = [searched.result for searched in pool.search(prompts)]
        right = [float(result.base_correct or result.best_path is not None) for result in results]
        layers = [float(sum(result.best_path or default_path(self.num_blocks))) for result in results]
        outcome = report("oracle", Outcome(right, layers))
        return {
            "questions": len(prompts),
            "accuracy": outcome.accuracy,
            "layers": outcome.mean_layers,
            "base_accuracy": statistics.mean(float(result.base_correct) for result in results),
        }


def compare(arguments: argparse.Namespace) -> dict:
    """Everything that the JSON holds but its provenance."""
    comparison = Comparison(arguments)
    greedy_paths, static = comparison.static()
    groups: list[tuple[str, list[Outcome]]] = [("base", [comparison.test.base])]
    for name, outcomes in static.items():
        groups += [(f"{name}: {skips} skipped", [outcome]) for skips, outcome in enumerate(outcomes) if skips]
    sets, details = {}, {}
    for method in arguments.methods:
        name = METHODS[method]
        trained = comparison.group_paths() if method == "group_paths" else comparison.published(method)
        outcomes, decisions, details[name] = trained
        groups += [(name, outcomes), (f"random: rates of {name}", comparison.random(name, decisions))]
        sets[name] = comparison.test.per_set(Outcome.average(outcomes))
    controls = static[GreedySkips.name]
    rows = [method_row(name, outcomes, comparison.test.base, controls) for name, outcomes in groups]
    if comparison.known is not None:
        known, imitating = comparison.known_paths()
        further = {"known paths": [known], "routers on known paths": imitating}
        groups += further.items()
        rows += [method_row(name, outcomes, comparison.test.base, controls) for name, outcomes in further.items()]
        for row, (_, outcomes) in zip(rows, groups, strict=True):
            row["recovered"] = share_recovered(Outcome.average(outcomes), comparison.test.base, known)
        sets["known paths"] = comparison.test.per_set(known)
        details["labels against known paths"] = {
            METHODS[method]: comparison.label_quality(labels) for method, labels in comparison.labels.items()
        }
    return {
        # As a reader of the repository would type them.
        "arguments": {key: str(value).removeprefix(f"{ROOT}/") for key, value in vars(arguments).items()},
        "test_questions": len(comparison.test.prompts),
        "static_paths": [list(path) for path in greedy_paths],
        "search": asdict(SearchSettings()),
        "labels": {METHODS[m]: labels.manifest.get("arguments") for m, labels in comparison.labels.items()} or None,
        "rows": rows,
        "sets": sets,
        "details": details,
        "oracle": comparison.oracle(arguments.oracle_questions) if arguments.oracle_questions else None,
    }


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    result = compare(arguments)
    write_result(
        arguments.output,
        result,
        command=command_line(PROGRAM, argv),
        seed=range(arguments.seeds),
        seconds=time.perf_counter() - start,
        table=methods_table(result),
    )
    draw_methods(result, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    raise SystemExit(main())
