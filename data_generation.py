"""Step 1 of 3: searches a routing label for each training question (DrLLM, section 3.2).

    python data_generation.py                                     # the embedded default, on a laptop
    accelerate launch --num_processes 8 data_generation.py --model meta-llama/Llama-3.2-3B-Instruct --dataset arc,dart

Writes labels.jsonl and manifest.json into --output_dir. Stopped at any moment, the same command continues, with any
number of processes and any batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from data_models import load_path_model
from drllm import labels, provenance
from drllm.errors import UserError, main_guard
from drllm.processes import from_main, process_state
from drllm.questions.prompts import Prompt, wants_chat_template
from drllm.questions.sets import GROUPS, SETS, Question, expand_sets, load_questions
from drllm.rollouts.engine import RolloutEngine
from drllm.search.pool import SearchPool
from drllm.search.progress import Progress, begin, finish, to_row
from drllm.search.selection import Selection, digest_of, seeded_order
from drllm.search.tree import DEFAULT_POLICY, POLICIES, SearchSettings

MINIATURE = Path(__file__).resolve().parent / "miniature"
SAMPLES_ELSEWHERE = 1000  # of sets for which the paper names no number
BATCH_SIZE = 128  # where to start; a batch that does not fit is halved


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults are the paper's."""
    parser = argparse.ArgumentParser(
        description="Search routing labels.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    paper = SearchSettings()
    add = parser.add_argument
    add("--model", default=None, help="folder or Hub name of a Llama, Qwen2 or Qwen3 model; default: the miniature")
    add("--revision", default=None, help="of the model on the Hub")
    add("--dataset", default="arc,dart", help="sets and groups, by comma: " + ", ".join(GROUPS | SETS))
    add("--data_dir", default=None, help="folder with local files of the Hub's schema; default: the Hub")
    add("--output_dir", default="data/", help="folder of the labels")
    add("--num_simulations", type=int, default=paper.num_simulations, help="of the tree search, a question")
    add("--budget", type=float, default=paper.budget, help="longest path, in multiples of the number of blocks")
    add("--c", type=float, default=paper.exploration, help="exploration constant of UCB")
    add("--lambda", dest="length_penalty", type=float, default=paper.length_penalty, help="length penalty of UCB")
    add("--p_rand", type=float, default=paper.random_child, help="probability of a random child")
    add("--policy", choices=POLICIES, default=DEFAULT_POLICY, help="which nodes of the tree grow")
    add(
        "--samples",
        default="paper",
        help='labels to keep a set: "paper" (Table 2), a number, or e.g. arc_easy=400,dart-1=200 (rest: paper)',
    )
    add("--wrong_to_right_share", type=float, default=0.3, help="of the labels of a set")
    add("--limit", type=int, default=None, help="search at most so many questions a set")
    add("--seed", type=int, default=0, help="of the order of questions and of each search")
    add("--dtype", default="auto", help="of the weights: bfloat16, float32, ...; auto: bfloat16 on a GPU, else float32")
    add("--chat_template", choices=("auto", "on", "off"), default="auto", help="auto: for models named ...instruct")
    add("--batch_size", type=int, default=BATCH_SIZE, help="rows a batch; halved when it does not fit")
    add("--concurrency", type=int, default=None, help="questions searched at once; default: 2 batches")
    return parser.parse_args(arguments)


def load(name: str, revision: str | None, dtype: torch.dtype, device: torch.device):
    """(model, tokenizer). UserError when there is no such model or its family is not supported."""
    try:
        model = load_path_model(name, dtype=dtype, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load --model {name}: {reason[:300]}") from error
    return model.to(device), tokenizer


def samples_of(setting: str, sets: list[str]) -> dict[str, int]:
    """How many labels to keep of each set."""
    samples = {name: SETS[name].samples or SAMPLES_ELSEWHERE for name in sets}
    if setting == "paper":
        return samples
    try:
        if setting.isdecimal():
            given = dict.fromkeys(sets, int(setting))
        else:
            given = {name.strip(): int(count) for name, count in (part.split("=") for part in setting.split(","))}
    except ValueError:
        raise UserError(f"--samples {setting}: expected paper, a number, or name=number,name=number") from None
    unknown = given.keys() - samples.keys()
    if unknown or min(given.values()) < 1:
        raise UserError(f"--samples {setting}: expected numbers of at least 1 for sets of --dataset: {', '.join(sets)}")
    return samples | given


def prompts_of(
    questions: Iterator[Question], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool
) -> Iterator[Prompt]:
    """The prompts of `questions`, without those that the model's context cannot hold, which are said once."""
    context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    too_long = 0
    for question in questions:
        prompt = Prompt.of(question, tokenizer, chat)
        if len(prompt.input_ids) + prompt.max_new_tokens <= context:
            yield prompt
        else:
            too_long += 1
    if too_long:
        print(f"left out {too_long} questions longer than the model's context of {context} tokens", file=sys.stderr)


class Display:
    """The progress line: questions done, simulations a second, wrong-to-right and layers saved so far, time left."""

    def __init__(self, progress: Progress, pool: SearchPool, state: PartialState) -> None:
        self.progress, self.pool = progress, pool
        self.num_processes = state.num_processes
        self.started = self.updated = time.monotonic()
        self.bar = tqdm(
            desc="searching",
            unit=" questions",
            initial=len(progress.selection.records),
            disable=not state.is_main_process,
            bar_format="{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}] {postfix}",
        )
        self.show()

    def after_round(self) -> None:
        """Reads what the other processes have finished, and shows it, at most once a second."""
        if time.monotonic() - self.updated >= 1:
            self.progress.update()
            self.show()

    def show(self) -> None:
        self.updated = time.monotonic()
        records = self.progress.selection.records.values()
        found = [record for record in records if record.kind is not None]
        fixed = sum(record.kind == labels.WRONG_TO_RIGHT for record in found)
        saved = sum(record.layers_saved for record in found) / max(len(found), 1)
        # The other processes' simulations in flight are not known here; they run about as many.
        rate = self.pool.simulations * self.num_processes / max(self.updated - self.started, 1e-9)
        self.bar.total = max(self.progress.selection.expected_visits(), len(records))
        self.bar.n = len(records)
        self.bar.set_postfix_str(
            f"{rate:.0f} simulations/s, {fixed} wrong-to-right, {saved:.2f} layers saved a label", refresh=False
        )
        self.bar.refresh()


def print_table2(rows: list[dict[str, Any]], folder: Path) -> None:
    """Table 2 of the paper, with what was found."""
    columns = ("set", "original", "sampled", "visited", "inferences", "wrong-to-right", "base accuracy", "layers saved")
    lines = [columns]
    for row in rows:
        shown = [row["set"], row["original"], row["sampled"], row["visited"], row["inferences"], row["wrong_to_right"]]
        shown += [f"{100 * row['base_correct'] / max(row['visited'], 1):.1f}%", f"{row['layers_saved']:.2f}"]
        lines.append(tuple(str(value) for value in shown))
    counts = ("original", "sampled", "visited", "inferences", "wrong_to_right")
    sums = {count: sum(row[count] for row in rows) for count in counts}
    accuracy = 100 * sum(row["base_correct"] for row in rows) / max(sums["visited"], 1)
    saved = sum(row["layers_saved"] * row["sampled"] for row in rows) / max(sums["sampled"], 1)
    lines.append(("total", *(str(value) for value in sums.values()), f"{accuracy:.1f}%", f"{saved:.2f}"))
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        cells = zip(line[1:], widths[1:], strict=True)
        print(line[0].ljust(widths[0]), *(f"{cell:>{width + 1}}" for cell, width in cells))
    for row in rows:
        if row["sampled"] < row["wanted"]:
            print(f"{row['set']}: {row['sampled']} of {row['wanted']} labels; no question is left to search")
    print(f"labels: {folder / 'labels.jsonl'}")


@main_guard
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        settings = SearchSettings(
            args.num_simulations, args.budget, args.c, args.length_penalty, args.p_rand, args.policy
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if not 0 <= args.wrong_to_right_share <= 1:
        raise UserError(f"--wrong_to_right_share is {args.wrong_to_right_share:g}; it must be within 0 and 1")
    for name in ("limit", "batch_size", "concurrency"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    sets = expand_sets(args.dataset)
    samples = samples_of(args.samples, sets)
    folder = Path(args.output_dir)
    name = args.model or str(MINIATURE / "model")
    data_dir = args.data_dir or (None if args.model else MINIATURE / "data")

    # A process that is done waits for the others at the end, for hours if need be.
    state = process_state(datetime.timedelta(days=30))
    on_gpu = state.device.type != "cpu"
    dtype = provenance.parse_dtype(("bfloat16" if on_gpu else "float32") if args.dtype == "auto" else args.dtype)
    model, tokenizer = load(name, args.revision, dtype, state.device)
    chat = wants_chat_template(args.chat_template, name, tokenizer)
    with state.main_process_first():  # so that a download happens once a machine
        questions = {set_name: load_questions(set_name, "train", data_dir) for set_name in sets}
    orders = {set_name: seeded_order(found, args.seed)[: args.limit] for set_name, found in questions.items()}

    manifest = {
        "format": labels.FORMAT,
        "model": name,
        "revision": args.revision,
        "model_fingerprint": provenance.fingerprint(model),
        "num_layers": model.config.num_hidden_layers,
        "dtype": provenance.dtype_name(dtype),
        "chat_template": chat,
        "seed": args.seed,
        "arguments": {
            "dataset": sets,
            "num_simulations": args.num_simulations,
            "budget": args.budget,
            "c": args.c,
            "lambda": args.length_penalty,
            "p_rand": args.p_rand,
            "policy": args.policy,
            "samples": samples,
            "wrong_to_right_share": args.wrong_to_right_share,
            "limit": args.limit,
        },
        "questions": {set_name: digest_of(found) for set_name, found in orders.items()},
        "data_dir": None if data_dir is None else str(data_dir),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    if state.is_main_process:
        begin(folder, manifest)
    state.wait_for_everyone()
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} is not shared by all machines: choose an --output_dir on a shared file system")
    selection = Selection(orders, samples, args.wrong_to_right_share)
    progress = Progress(folder, state.process_index, selection)
    progress.update()
    # What the main process knows counts: on a network disk another may not see all records yet.
    finished = from_main(state, lambda: set(selection.records))
    progress.open()

    engine = RolloutEngine(model, tokenizer, args.batch_size)
    pool = SearchPool(engine, settings, args.seed, args.concurrency or 2 * args.batch_size)
    pool.is_wanted = lambda prompt, base_correct: selection.is_wanted(
        prompt.question, labels.SHORTER if base_correct else labels.WRONG_TO_RIGHT
    )
    display = Display(progress, pool, state)
    pool.after_round = display.after_round
    remaining = selection.remaining(state.process_index, state.num_processes, finished)
    try:
        with display.bar:
            for searched in pool.search(prompts_of(remaining, model, tokenizer, chat)):
                progress.append(to_row(searched))
            progress.close()
            state.wait_for_everyone()
            progress.update()
            display.show()
        if state.is_main_process:
            print_table2(finish(folder, progress), folder)
        state.wait_for_everyone()
        state.destroy_process_group()
    except KeyboardInterrupt:
        if not state.is_main_process:
            raise SystemExit(130) from None
        safe = f"at least {len(selection.records)} finished questions are in {folder}"
        raise KeyboardInterrupt(f"{safe}; the same command continues") from None
    finally:
        with contextlib.suppress(UserError):  # what went wrong before is the one to hear of
            progress.close()


if __name__ == "__main__":
    raise SystemExit(main())
