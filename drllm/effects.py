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

Each of the steps 2, 4 (once a skip) and 6 costs about L / 2 forward passes a training question. To make a checkpoint:

    python -m drllm.effects --data_dir miniature/data --price 0.004 --output_dir checkpoints/groups

`drllm.claim` compares it with the published way and with controls, the price chosen on validation questions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm import tasks
from drllm.ablations import MINIATURE_DATA, routed_paths
from drllm.errors import main_guard
from drllm.features import pad_ids
from drllm.provenance import fingerprint, parse_dtype
from drllm.rollout import Prompt
from drllm.router_checkpoint import load_routed, load_tokenizer, save_routers
from drllm.router_modules import StackedRouters
from train_models.paths import EXECUTE, SKIP, Path, default_path, is_allowed, path_to_layer_indices

NUM_ACTIONS = 3
MARGIN_SCALE = 0.3  # nats of margin a unit of the sigmoid's argument
KERNEL_WIDTH = 1.0  # of standardised states whose squared distance is a mean over features
KERNEL_NOISE = 3.0  # variance of one question's own effect over that of what questions share


@dataclass(frozen=True)
class Answered:
    """A prompt and the tokens of its right answer, in the form the model is asked for."""

    prompt: Prompt
    answer_ids: tuple[int, ...]

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Answered:
        question = prompt.question
        is_math = tasks.SETS[question.set].kind == "math"
        text = f" \\boxed{{{question.answer}}}" if is_math else f" {question.answer}"
        answer_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return cls(prompt, tuple(answer_ids))


@dataclass
class EffectRound:
    """What one round measured around `paths`: rewards float32 [N, L, 3] with block l's action replaced (nan where it
    was not asked or no block would run), and what the routers read there, windows [N, L, W, d] and mask [N, W].
    """

    paths: list[Path]
    rewards: torch.Tensor
    windows: torch.Tensor
    window_mask: torch.Tensor

    def own(self) -> torch.Tensor:
        """Rewards of the paths themselves, [N]."""
        actions = torch.tensor(self.paths)[:, :1]
        return self.rewards[:, 0].gather(1, actions)[:, 0]


@torch.inference_mode()
def measure(
    routed: PreTrainedModel,
    questions: Sequence[Answered],
    paths: Sequence[Path],
    batch_size: int = 64,
    actions: Sequence[int] = (SKIP, EXECUTE),
) -> EffectRound:
    """One `EffectRound` over `questions` around `paths`, one path each, with each block's action replaced by `actions`.

    Costs a pass along each path and, for each block and other action, one from that block on.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt.input_ids))
    num_blocks = routed.config.num_hidden_layers
    rewards = torch.full((len(questions), num_blocks, NUM_ACTIONS), float("nan"))
    windows, masks = [torch.empty(0)] * len(questions), [torch.empty(0)] * len(questions)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch, batch_paths = [questions[i] for i in chosen], [paths[i] for i in chosen]
        measured, inputs, mask = _measure_batch(routed, batch, batch_paths, actions)
        for row, i in enumerate(chosen):
            rewards[i], windows[i], masks[i] = measured[row], inputs[row], mask[row]
    return EffectRound(list(paths), rewards, torch.stack(windows), torch.stack(masks))


def _measure_batch(routed, batch: list[Answered], paths: list[Path], actions: Sequence[int]):
    """(rewards [B, L, 3], router inputs [B, L, W, d], window mask [B, W])."""
    ids, length, places, targets = (each.to(routed.device) for each in _teacher_forced(batch))
    along = routed.model(
        input_ids=ids,
        layer_indices=[path_to_layer_indices(path) for path in paths],
        prompt_length=length,
        use_cache=False,
        output_hidden_states=True,
        output_router_inputs=True,
    )

    def reward(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        answers = hidden[torch.arange(len(rows), device=hidden.device)[:, None], places[rows]]
        logits = routed.lm_head(answers).float()
        gold = targets[rows].clamp_min(0)[..., None]
        margins = logits.gather(2, gold)[..., 0] - logits.scatter(2, gold, -torch.inf).amax(-1)
        weakest = margins.masked_fill(targets[rows] < 0, torch.inf).amin(1)
        return (weakest / MARGIN_SCALE).sigmoid().cpu()

    current = reward(along.last_hidden_state, torch.arange(len(batch), device=routed.device))
    num_blocks = len(paths[0])
    rewards = torch.full((len(batch), num_blocks, NUM_ACTIONS), float("nan"))
    for block in range(num_blocks):
        rewards[torch.arange(len(batch)), block, [path[block] for path in paths]] = current
        for action in actions:
            changed, rows = [], []
            for row, path in enumerate(paths):
                other = (*path[:block], action, *path[block + 1 :])
                if other != path and sum(other):
                    # Below the changed block nothing changes: start from its input on the unchanged path.
                    changed.append(path_to_layer_indices((0,) * block + other[block:]))
                    rows.append(row)
            if rows:
                there = torch.tensor(rows, device=routed.device)
                inputs = along.hidden_states[block][there]
                hidden = routed.model(inputs_embeds=inputs, layer_indices=changed, use_cache=False).last_hidden_state
                rewards[rows, block, action] = reward(hidden, there)
    return rewards, along.router_inputs.cpu(), along.window_mask.cpu()


def _teacher_forced(batch: list[Answered]):
    """Right-padded prompt + answer [B, T], prompt lengths [B], and for each answer token where it is predicted and its
    id [B, A], -1 beyond the answer. Causal attention needs no mask for padding on the right."""
    rows = [(*each.prompt.input_ids, *each.answer_ids[:-1]) for each in batch]
    ids = torch.zeros(len(batch), max(map(len, rows)), dtype=torch.long)
    longest = max(len(each.answer_ids) for each in batch)
    places = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.full((len(batch), longest), -1)
    for row, (each, tokens) in enumerate(zip(batch, rows, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        count = len(each.answer_ids)
        places[row, :count] = len(each.prompt.input_ids) - 1 + torch.arange(count)
        targets[row, :count] = torch.tensor(each.answer_ids)
    return ids, torch.tensor([len(each.prompt.input_ids) for each in batch]), places, targets


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
    routed: PreTrainedModel,
    questions: Sequence[Answered],
    groups: torch.Tensor,
    first: EffectRound,
    most_skips: int,
    batch_size: int = 64,
) -> list[list[GroupPath]]:
    """For each group its paths of 0, 1, ... skips, each the former and the skip that leaves the highest mean reward.

    Args:
        groups: [N], the group of each question.
        first: measured around the default path.
    """
    count = int(groups.max()) + 1
    paths = [default_path(routed.config.num_hidden_layers)] * count
    chains: list[list[GroupPath]] = [[] for _ in range(count)]
    measured = first
    open_groups = set(groups.tolist())
    for skips in range(most_skips + 1):
        if skips:
            measured = measure(routed, questions, [paths[group] for group in groups.tolist()], batch_size)
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


@torch.inference_mode()
def read_along(
    routed: PreTrainedModel, questions: Sequence[Answered], paths: Sequence[Path], batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the routers read along `paths`: windows [N, L, W, d] and mask [N, W]."""
    windows, masks = [torch.empty(0)] * len(questions), [torch.empty(0)] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt.input_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        output = routed.model(
            **pad_ids([questions[i].prompt.input_ids for i in chosen], 0, routed.device),
            layer_indices=[path_to_layer_indices(paths[i]) for i in chosen],
            use_cache=False,
            output_router_inputs=True,
        )
        for row, i in enumerate(chosen):
            windows[i], masks[i] = output.router_inputs[row].cpu(), output.window_mask[row].cpu()
    return torch.stack(windows), torch.stack(masks)


def imitate(
    routers: StackedRouters,
    windows: torch.Tensor,
    window_mask: torch.Tensor,
    labels: Sequence[Path],
    epochs: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Cross-entropy on `labels`; returns the last epoch's mean loss."""
    targets = torch.tensor(labels)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        logits = routers(windows[chosen], window_mask[chosen])["logits"]
        return F.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten())

    return _train(routers, loss, len(labels), epochs, learning_rate, seed)


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
    for _ in range(epochs):
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
    """Steps 1 to 4, done once for `questions`; then labels at any price, and routers for a price and a seed."""

    def __init__(
        self,
        routed: PreTrainedModel,
        questions: Sequence[Answered],
        groups: int = 20,
        most_skips: int = 4,
        batch_size: int = 64,
    ) -> None:
        self.routed = routed
        self.questions = questions
        self.batch_size = batch_size
        default = default_path(routed.config.num_hidden_layers)
        first = measure(routed, questions, [default] * len(questions), batch_size)
        of_skips = first.rewards[:, :, SKIP] - first.rewards[:, :, EXECUTE]
        self.groups = groups_of(smoothed(of_skips, first.windows, first.window_mask), groups, seed=0)
        self.chains = grow(routed, questions, self.groups, first, most_skips, batch_size)

    def labels(self, price: float) -> list[Path]:
        """A path a question."""
        return at_price(self.chains, self.groups, price)

    def train_routers(self, price: float, seed: int) -> None:
        """Steps 5 and 6 from the initial weights of `seed`; leaves the routers in the model."""
        self.routed.model.init_routers(seed)
        routers = StackedRouters(self.routed.model.routers).cpu()
        labels = self.labels(price)
        windows, mask = read_along(self.routed, self.questions, labels, self.batch_size)
        imitate(routers, windows, mask, labels, epochs=10, learning_rate=1e-3, seed=seed)
        routers.copy_to(self.routed.model.routers)
        paths = routed_paths(self.routed, [each.prompt for each in self.questions], self.batch_size)
        around = measure(self.routed, self.questions, paths, self.batch_size)
        refine(routers, around, price, epochs=4, learning_rate=3e-4, seed=seed)
        routers.copy_to(self.routed.model.routers)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Questions to a routed checkpoint, like data_generation.py and train.py together."""
    parser = argparse.ArgumentParser(prog="python -m drllm.effects", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(MINIATURE_DATA.parent / "model"))
    parser.add_argument("--revision")
    parser.add_argument("--dtype", default="float32")
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
    tokenizer = load_tokenizer(arguments.model, arguments.revision)
    routed = load_routed(arguments.model, parse_dtype(arguments.dtype), arguments.revision, {}).eval()
    routed.to("cuda" if torch.cuda.is_available() else "cpu")
    routed.config.base_model_name, routed.config.base_model_revision = arguments.model, arguments.revision
    routed.config.base_model_fingerprint = fingerprint(routed)
    routed.config.trained_num_windows = routed.config.num_windows
    chat = tasks.wants_chat_template("auto", arguments.model, tokenizer)
    questions = [
        Answered.of(Prompt.of(question, tokenizer, chat), tokenizer)
        for name in tasks.expand_sets(arguments.dataset)
        for question in tasks.load_questions(name, "train", arguments.data_dir, arguments.train_questions)
    ]
    print(f"measuring {len(questions)} questions", file=sys.stderr, flush=True)
    found = PathsOfGroups(routed, questions, arguments.groups, arguments.most_skips, arguments.batch_size)
    labels = found.labels(arguments.price)
    layers = sum(map(sum, labels)) / len(labels)
    print(f"labels: {len(set(labels))} paths, {layers:.2f} layers on average; training", file=sys.stderr, flush=True)
    found.train_routers(arguments.price, arguments.seed)
    routed.cpu()
    routed.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    save_routers(routed, arguments.output_dir / "routers")
    print(f"wrote {arguments.output_dir}")


if __name__ == "__main__":
    raise SystemExit(main())
