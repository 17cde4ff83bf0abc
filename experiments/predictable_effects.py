"""How much of what an edit does to a question can be told from its prompt, and what a router could gain by it.

    python -m experiments.predictable_effects --scores checkpoints/groups-measured --model MODEL --data_dir questions \
        --dataset arc,openbookqa,commonsense --train_questions 600 --output predictable.json

Reads the scores that `experiments.group_paths --reward likelihood` has measured. For each collection of sets, every
path along which its training questions were scored has a row: the mean change of the right option's probability, and
the correlation of each question's change with the one that the other questions predict (kernel ridge regression on
what the routers read, leave-one-out). The last rows compare what all questions would gain along the path that is best
on average, and each along the path that its prediction calls best. Where the second is no better, a router has nothing
to decide inside a collection: one path for all of it is the most that can be had.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from collections import Counter

import torch

from drllm.arguments import check_ranges
from drllm.checkpoints import load_routed, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.group_paths.likelihood_rewards import LikelihoodRewards
from drllm.group_paths.paths import describe_edits
from drllm.group_paths.scored_questions import add_scores_arguments, scored_parts
from drllm.processes import process_state
from drllm.provenance import command_line, dtype_name, fingerprint, parse_dtype, write_result
from drllm.questions.likelihood import LikelihoodPrompt, require_choices
from drllm.questions.sets import collections_of, expand_sets
from drllm.rollouts.scores import ScoreStore
from extensions.groups.grouping import smoothed
from train_models.paths import Path as BlockPath
from train_models.paths import default_path

PROGRAM = "python -m experiments.predictable_effects"
LEAST_QUESTIONS = 20  # of a collection: fewer predict nothing


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, a missing folder, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="as given to experiments.group_paths, like --dtype")
    add("--dtype", default="float32", help="of the base model (default: float32)")
    add("--batch_size", type=int, default=8, help="questions per forward pass (default: 8)")
    add_scores_arguments(parser, share=0.95, validates=False)
    arguments = parser.parse_args(argv)
    check_ranges(arguments, batch_size=(1, math.inf))
    arguments.parts = scored_parts(arguments)
    require_choices(expand_sets(arguments.dataset))
    parse_dtype(arguments.dtype)
    return arguments


def predictability(effects: torch.Tensor, windows: torch.Tensor, window_mask: torch.Tensor) -> dict:
    """How well effects can be predicted, and what following the predictions gains.

    Args:
        effects: [N, K], the change of the reward of N questions along K paths against the default path.
        windows, window_mask: what the routers read along the default path, [N, L, W, d] and bool [N, W].

    Returns:
        "mean", "error", "correlation": one value per path; "constant" and "predicted": the mean gain, with its standard
        error, of the path that is best on average over the other questions, and of the path predicted to be best; the
        default path, which gains nothing, is always among the choices.
    """
    count = len(effects)
    predicted = smoothed(effects, windows, window_mask)
    pairs = [torch.stack([effects[:, k], predicted[:, k]]) for k in range(effects.shape[1])]
    with_default = torch.cat([torch.zeros(count, 1), effects], 1)

    def gain(values: torch.Tensor) -> dict[str, float]:
        best = torch.cat([torch.zeros(count, 1), values], 1).argmax(1, keepdim=True)
        gains = with_default.gather(1, best)[:, 0]
        return {"mean": gains.mean().item(), "error": (gains.std() / math.sqrt(count)).item()}

    return {
        "mean": effects.mean(0).tolist(),
        "error": (effects.std(0) / math.sqrt(count)).tolist(),
        "correlation": [torch.corrcoef(pair)[0, 1].item() for pair in pairs],
        "constant": gain((effects.sum(0) - effects) / (count - 1)),
        "predicted": gain(predicted),
    }


def collection_rows(
    name: str,
    members: list[int],
    scored: list[set[BlockPath]],
    rewards: LikelihoodRewards,
    read: tuple[torch.Tensor, torch.Tensor],
    share: float,
) -> list[dict]:
    """The rows of one collection of questions.

    Args:
        members: places of its questions among the prompts of `rewards`.
        scored: for each of them the paths along which it was scored.
        read: what the routers read of all prompts along the default path.
        share: least share of the questions scored along a path that has a row.
    """
    default = default_path(rewards.routed.config.num_hidden_layers)
    counts = Counter(path for paths in scored for path in paths)
    if counts[default] < LEAST_QUESTIONS:
        return []
    paths: list[BlockPath] = sorted(
        path for path, number in counts.items() if path != default and number >= share * counts[default]
    )
    wanted = {default, *paths}
    members = [index for index, of_index in zip(members, scored, strict=True) if wanted <= of_index]
    if not paths or len(members) < LEAST_QUESTIONS:
        return []
    values = torch.tensor(
        [[rewards.reward(rewards.prompts[index], path) for path in (default, *paths)] for index in members]
    )
    found = predictability(values[:, 1:] - values[:, :1], read[0][members], read[1][members])
    common = {"collection": name, "questions": len(members)}
    columns = zip(paths, found["mean"], found["error"], found["correlation"], strict=True)
    rows = [
        common
        | {"edits": describe_edits(path), "layers": sum(path), "gain": mean, "error": error, "correlation": correlation}
        for path, mean, error, correlation in columns
    ]
    for title, key in (("one path for all", "constant"), ("each along its predicted best path", "predicted")):
        gain = found[key]
        rows.append(common | {"edits": title, "gain": gain["mean"], "error": gain["error"]})
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown, in points."""
    lines = ["| questions of | number | edits | layers | gain | correlation |", "|---|---|---|---|---|---|"]
    for row in rows:
        correlation = f"{row['correlation']:+.2f}" if "correlation" in row else ""
        lines.append(
            f"| {row['collection']} | {row['questions']} | {row['edits']} | {row.get('layers', '')} | "
            f"{100 * row['gain']:+.2f} ± {100 * row['error']:.2f} | {correlation} |"
        )
    return "\n".join(lines)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    state = process_state(datetime.timedelta(days=1))
    tokenizer = load_tokenizer(arguments.model)
    routed = load_routed(arguments.model, parse_dtype(arguments.dtype), None, {}).eval().to(state.device)
    key = {"model_fingerprint": fingerprint(routed), "dtype": dtype_name(routed.dtype)}
    store = ScoreStore(arguments.scores, key, rank=None)
    sets = arguments.parts.split(arguments.data_dir, arguments.unlike, arguments.seed)
    prompts = [LikelihoodPrompt.of(question, tokenizer) for train, _ in sets.values() for question in train]
    rewards = LikelihoodRewards(routed, prompts, store, state, arguments.batch_size)
    read = rewards.windows([default_path(routed.config.num_hidden_layers)] * len(prompts))
    if state.is_main_process:
        members: dict[str, list[int]] = {}
        collections = collections_of(arguments.dataset)
        for index, prompt in enumerate(prompts):
            members.setdefault(collections[prompt.question.set], []).append(index)
        scores_of, rows = store.by_question(), []
        for name, own in members.items():
            scored = [set(scores_of.get(prompts[index].question.id, ())) for index in own]
            rows += collection_rows(name, own, scored, rewards, read, arguments.share)
        if not rows:
            raise UserError(f"{arguments.scores} has no path scored along by {arguments.share:g} of a collection")
        write_result(
            arguments.output,
            {"base": key, "rows": rows},
            command=command_line(PROGRAM, argv),
            seed=arguments.seed,
            seconds=time.perf_counter() - start,
            table=table(rows),
        )
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
