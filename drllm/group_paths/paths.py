"""Labels from what is alike in many questions, a rival of the published labels.

A label of the search says which path happened to answer one question right, and mostly it is luck: on the next
question of its kind the same path is wrong. Here a path has to serve many questions that are alike, and the reward is
not only right or wrong:

1. Reward with a margin. `measure` gives the sigmoid of the margin, in nats, by which the right answer beats its best
   rival at its weakest token; 1/2 is the border between right and wrong under greedy decoding.
2. Effects. Each block of each training question is asked what skipping it does to the reward.
3. Neighbours. Effects are smoothed over questions with similar hidden states, each question's own left out
   (`smoothed`), and questions with similar smoothed effects form groups (`groups_of`).
4. A path a group. From the default path on, a group skips the block whose loss costs the mean reward of its questions
   least, with all effects measured anew after each skip (`grow`). A price a skipped block, in reward, says how far.
5. The published training, less its class weights and gamma: routers learn the group paths by cross-entropy on states
   that follow them (`imitate`).
6. One round on the routers' own decisions: effects measured around these, and the expected reward of the routers'
   probabilities, less the price of a block, raised directly (`refine`).

Each of the steps 2, 4 (once a skip) and 6 costs about L / 2 forward passes a training question (`drllm/rewards.py`). To
make a checkpoint (stopped at any moment, the same command continues; one process a GPU):

    python -m drllm.effects --data_dir miniature/data --price 0.004 --output_dir checkpoints/groups
    accelerate launch --num_processes 8 -m drllm.effects --model meta-llama/Llama-3.2-3B-Instruct --output_dir ...

`drllm.claim` compares it with the published way and with controls, the price chosen on validation questions.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from drllm.checkpoints import load_routed, load_tokenizer, save_checkpoint
from drllm.errors import main_guard
from drllm.group_paths.margin_rewards import NUM_ACTIONS, Answered, EffectRound, RoundStore, measure
from drllm.processes import Made, from_main, process_state
from drllm.provenance import commit, dtype_name, fingerprint, parse_dtype, versions
from drllm.questions.prompts import Prompt, wants_chat_template
from drllm.questions.sets import expand_sets, load_questions
from drllm.training.router_modules import StackedRouters
from experiments.ablations import MINIATURE_DATA, routed_paths
from train_models.paths import EXECUTE, SKIP, Path, default_path, is_allowed

KERNEL_WIDTH = 1.0  # of standardised states whose squared distance is a mean over features
KERNEL_NOISE = 3.0  # variance of one question's own effect over that of what questions share


# --------------------------------------------------------------------------------------------------------
# Questions that are alike


def smoothed(effects: torch.Tensor, windows: torch.Tensor, window_mask: torch.Tensor) -> torch.Tensor:
    """Each question's effects [N, L] as its neighbours predict them, its own left out.

    Kernel ridge regression (Gaussian kernel) on the last and the mean window of every router's input, solved for all
    questions at once; leaving one out has a closed form. Memory and time grow with N^2 and N^3: seconds at 6,000.
    """
    last = window_mask.sum(1) - 1
    valid = window_mask[:, None, :, None]
    mean = (windows * valid).sum(2) / valid.sum(2)
    features = torch.cat([windows[torch.arange(len(windows)), :, last], mean], dim=2).flatten(1).float()
    features = (features - features.mean(0)) / (features.std(0) + 1e-6) / features.shape[1] ** 0.5
    kernel = torch.exp(-torch.cdist(features, features).square() / KERNEL_WIDTH)
    regularised = kernel + KERNEL_NOISE * torch.eye(len(kernel))
    smoother = torch.linalg.solve(regularised, kernel).T  # K (K + noise)^-1
    own = smoother.diagonal()[:, None]
    mean_effects = effects.mean(0)
    centred = effects - mean_effects
    return (smoother @ centred - own * centred) / (1 - own) + mean_effects


def groups_of(effects: torch.Tensor, count: int, seed: int, steps: int = 50) -> torch.Tensor:
    """k-means of `effects` [N, L] into at most `count` groups, started by k-means++; returns the group of each, [N]."""
    generator = torch.Generator().manual_seed(seed)
    centres = effects[torch.randint(len(effects), (1,), generator=generator)]
    while len(centres) < min(count, len(effects)):
        distance = torch.cdist(effects, centres).min(1).values.square()
        if not distance.any():
            break
        centres = torch.cat([centres, effects[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(steps):
        nearest = torch.cdist(effects, centres).argmin(1)
        members = [nearest == number for number in range(len(centres))]
        centres = torch.stack([effects[m].mean(0) if m.any() else c for m, c in zip(members, centres, strict=True)])
    return torch.cdist(effects, centres).argmin(1)


@dataclass(frozen=True)
class GroupPath:
    """A path and the mean reward of its group's questions along it."""

    path: Path
    reward: float


def grow(
    measure_around: Callable[[list[Path], int], EffectRound], groups: torch.Tensor, first: EffectRound, most_skips: int
) -> list[list[GroupPath]]:
    """For each group its paths of 0, 1, ... skips, each the former and the skip that leaves the highest mean reward.

    Args:
        measure_around: (a path a question, their number of skips) -> what `measure` finds.
        groups: [N], the group of each question.
        first: measured around the default path.
    """
    count = int(groups.max()) + 1
    paths = [first.paths[0]] * count
    chains: list[list[GroupPath]] = [[] for _ in range(count)]
    measured = first
    open_groups = set(groups.tolist())
    for skips in range(most_skips + 1):
        if skips:
            measured = measure_around([paths[group] for group in groups.tolist()], skips)
        for group in sorted(open_groups):
            members = groups == group
            path = paths[group]
            chains[group].append(GroupPath(path, float(measured.own()[members].mean())))
            means = measured.rewards[members, :, SKIP].mean(0)
            options = [(*path[:block], SKIP, *path[block + 1 :]) for block in range(len(path))]
            allowed = [b for b, other in enumerate(options) if path[b] != SKIP and sum(other) and is_allowed(other)]
            if allowed:
                paths[group] = options[max(allowed, key=lambda block: float(means[block]))]
            else:
                open_groups.remove(group)
    return chains


def at_price(chains: Sequence[Sequence[GroupPath]], groups: torch.Tensor, price: float) -> list[Path]:
    """The label of each question: its group's path with the highest mean reward plus `price` a skipped block."""

    def worth(each: GroupPath) -> float:
        return each.reward + price * each.path.count(SKIP)

    return [max(chains[group], key=worth).path for group in groups.tolist()]


# --------------------------------------------------------------------------------------------------------
# Routers


def imitate(routers: StackedRouters, along: EffectRound, epochs: int, learning_rate: float, seed: int) -> float:
    """Cross-entropy on the paths of `along`; returns the last epoch's mean loss."""
    targets = torch.tensor(along.paths)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        logits = routers(along.windows[chosen], along.window_mask[chosen])["logits"]
        return F.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten())

    return _train(routers, loss, len(targets), epochs, learning_rate, seed)


def refine(
    routers: StackedRouters, around: EffectRound, price: float, epochs: int, learning_rate: float, seed: int
) -> float:
    """Raises the expected reward, less `price` a block application, of the routers' probabilities, each block by itself
    around the paths of `around`; actions that were not asked are as bad as a lost answer. Returns the last epoch's
    mean loss."""
    paths = torch.tensor(around.paths)
    more = torch.arange(NUM_ACTIONS) - paths[..., None]  # applications, against the path's own
    gains = (around.rewards - around.own()[:, None, None]).nan_to_num(-1.0) - price * more

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        probabilities = routers(around.windows[chosen], around.window_mask[chosen])["logits"].softmax(-1)
        # Rewards are small beside cross-entropies; the factor makes AdamW's epsilon harmless.
        return -10 * (probabilities * gains[chosen]).sum(-1).mean()

    return _train(routers, loss, len(paths), epochs, learning_rate, seed)


def _train(routers: nn.Module, loss_of, count: int, epochs: int, learning_rate: float, seed: int) -> float:
    """AdamW with cosine decay, 32 questions a step, in an order of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    batches = -(-count // 32)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    losses = [float("nan")]
    for _ in tqdm(range(epochs), desc="training the routers", unit="epoch"):
        losses = []
        for chosen in torch.randperm(count, generator=generator).split(32):
            loss = loss_of(chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


class PathsOfGroups:
    """Steps 1 to 4, done once for `questions`; then labels at any price, and routers for a price and a seed.

    With a `RoundStore` what was measured before is not measured again, and several processes share the measuring; the
    main process then trains the routers, and all get them.
    """

    def __init__(
        self,
        routed: PreTrainedModel,
        questions: Sequence[Answered],
        groups: int = 20,
        most_skips: int = 4,
        batch_size: int = 64,
        store: RoundStore | None = None,
    ) -> None:
        self.routed = routed
        self.questions = questions
        self.batch_size = batch_size
        self.store = store
        default = default_path(routed.config.num_hidden_layers)
        first = self._measure([default] * len(questions), "around the base model")
        of_skips = first.rewards[:, :, SKIP] - first.rewards[:, :, EXECUTE]
        self.groups = self._from_main(
            lambda: groups_of(smoothed(of_skips, first.windows, first.window_mask), groups, seed=0)
        )

        def measure_around(paths: list[Path], skips: int) -> EffectRound:
            return self._measure(paths, f"around paths of {skips} skips, at most {most_skips}", with_windows=False)

        self.chains = grow(measure_around, self.groups, first, most_skips)

    def labels(self, price: float) -> list[Path]:
        """A path a question."""
        return at_price(self.chains, self.groups, price)

    def train_routers(self, price: float, seed: int) -> None:
        """Steps 5 and 6 from the initial weights of `seed`; leaves the routers in the model."""
        self.routed.model.init_routers(seed)
        routers = StackedRouters(self.routed.model.routers).cpu()
        labels = self.labels(price)
        along = self._measure(labels, "along the groups' paths", actions=())
        self._train(routers, lambda: imitate(routers, along, epochs=10, learning_rate=1e-3, seed=seed))
        prompts = [each.prompt for each in self.questions]
        paths = self._from_main(lambda: routed_paths(self.routed, prompts, self.batch_size))
        around = self._measure(paths, "around the routers' decisions")
        self._train(routers, lambda: refine(routers, around, price, epochs=4, learning_rate=3e-4, seed=seed))

    def _measure(self, paths: Sequence[Path], title: str, **arguments) -> EffectRound:
        return measure(self.routed, self.questions, paths, self.batch_size, store=self.store, title=title, **arguments)

    def _from_main(self, make: Callable[[], Made]) -> Made:
        return make() if self.store is None else from_main(self.store.state, make)

    def _train(self, routers: StackedRouters, train: Callable[[], float]) -> None:
        """On the main process; then all have the routers, and their models, too."""

        def weights() -> dict[str, torch.Tensor]:
            train()
            return routers.state_dict()

        routers.load_state_dict(self._from_main(weights))
        routers.copy_to(self.routed.model.routers)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Questions to a routed checkpoint, like data_generation.py and train.py together."""
    parser = argparse.ArgumentParser(prog="python -m drllm.effects", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MINIATURE_DATA.parent / "model"))
    parser.add_argument("--revision")
    parser.add_argument("--dtype", default="auto", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--data_dir", type=FilePath, help="local question files; default: the Hub")
    parser.add_argument("--dataset", default="arc,dart")
    parser.add_argument("--train_questions", type=int, default=800, help="a set, at most")
    parser.add_argument("--groups", type=int, default=20, help="of like questions")
    parser.add_argument("--most_skips", type=int, default=4, help="skipped blocks of a group's path")
    parser.add_argument("--price", type=float, default=0.004, help="reward that a skipped block may cost a group")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=FilePath, required=True)
    arguments = parser.parse_args(argv)
    state = process_state(datetime.timedelta(days=30))  # the others wait while the main process trains
    dtype = ("float32" if state.device.type == "cpu" else "bfloat16") if arguments.dtype == "auto" else arguments.dtype
    tokenizer = load_tokenizer(arguments.model, arguments.revision)
    routed = load_routed(arguments.model, parse_dtype(dtype), arguments.revision, {}).eval().to(state.device)
    routed.config.base_model_name, routed.config.base_model_revision = arguments.model, arguments.revision
    routed.config.base_model_fingerprint = fingerprint(routed)
    routed.config.trained_num_windows = routed.config.num_windows
    chat = wants_chat_template("auto", arguments.model, tokenizer)
    with state.main_process_first():  # so that a download happens once a machine
        questions = [
            Answered.of(Prompt.of(question, tokenizer, chat), tokenizer)
            for name in expand_sets(arguments.dataset)
            for question in load_questions(name, "train", arguments.data_dir, arguments.train_questions)
        ]
    measured = arguments.output_dir.with_name(arguments.output_dir.name + "-measured")
    store = RoundStore(measured, routed.config.base_model_fingerprint, state)
    try:
        found = PathsOfGroups(routed, questions, arguments.groups, arguments.most_skips, arguments.batch_size, store)
        labels = found.labels(arguments.price)
        layers = sum(map(sum, labels)) / len(labels)
        if state.is_main_process:
            print(f"labels: {len(set(labels))} paths, {layers:.2f} layers on average", file=sys.stderr, flush=True)
        found.train_routers(arguments.price, arguments.seed)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was measured is in {measured}; the same command continues") from None
    if state.is_main_process:
        routed.cpu()
        # As after a search: eval.sh reads here whether prompts have the chat template.
        manifest = {
            "model": arguments.model,
            "revision": arguments.revision,
            "model_fingerprint": routed.config.base_model_fingerprint,
            "dtype": dtype_name(routed.dtype),
            "chat_template": chat,
            "labels": len(labels),
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "versions": versions(),
            "commit": commit(),
        }
        save_checkpoint(routed, tokenizer, arguments.output_dir, manifest)
        print(f"wrote {arguments.output_dir}; {measured} holds what was measured, for other prices and seeds")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
