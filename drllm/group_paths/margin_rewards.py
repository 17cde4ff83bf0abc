"""The margin reward of an answer, and what replacing each block's action does to it.

A round (`MarginRewards.around`) starts from one path per question. It measures what becomes of the reward when the
action of one block is replaced, block by block, and records what the routers read on the unchanged path. With a
`RoundStore` the parts of a round are kept on disk as they are finished: a resumed run measures nothing twice, and
several processes share the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm.files import disk_errors, is_whole, write_tensors
from drllm.processes import from_main
from drllm.questions.prompts import Prompt
from drllm.questions.sets import SETS
from train_models.paths import EXECUTE, SKIP, Path, path_to_layer_indices

NUM_ACTIONS = 3
MARGIN_SCALE = 0.3  # nats of margin per unit of the sigmoid's argument
PART_QUESTIONS = 512  # per file of the store: what a kill may lose


@dataclass(frozen=True)
class Answered:
    """A prompt and the tokens of its gold answer, in the form that the prompt asks for."""

    prompt: Prompt
    answer_ids: tuple[int, ...]

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Answered:
        """`prompt` with its question's gold answer: a boxed value for math, otherwise the answer itself, then EOS."""
        question = prompt.question
        is_math = SETS[question.set].kind == "math"
        text = f" \\boxed{{{question.answer}}}" if is_math else f" {question.answer}"
        answer_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return cls(prompt, tuple(answer_ids))


@dataclass
class RewardRound:
    """What one round measured around `paths`, for N questions, L blocks and W windows.

    rewards: float32 [N, L, 3], the reward with block l's action replaced; NaN where that was not measured or no block
        would run.
    windows, window_mask: what the routers read along the paths, [N, L, W, d] and bool [N, W]; None where not wanted.
    """

    paths: list[Path]
    rewards: torch.Tensor
    windows: torch.Tensor | None = None
    window_mask: torch.Tensor | None = None

    def own(self) -> torch.Tensor:
        """Rewards of the paths themselves, [N]."""
        actions = torch.tensor(self.paths)[:, :1]
        return self.rewards[:, 0].gather(1, actions)[:, 0]


@dataclass(frozen=True)
class RoundStore:
    """Where the parts of rounds are kept, and the processes that share the work.

    folder: on a disk that all processes see; one subfolder per round, named after everything the round depends on.
    model_fingerprint: of the base weights.
    """

    folder: FilePath
    model_fingerprint: str
    state: PartialState

    def open(self, key: dict, count: int) -> tuple[list[FilePath], list[int]]:
        """(the files of parts 0 to `count` - 1 of the round `key`, the numbers of the missing ones).

        Raises:
            UserError: when the folder cannot be made.
        """
        text = json.dumps({"model_fingerprint": self.model_fingerprint, **key})
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        files = [folder / f"{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
        with disk_errors(self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number, file in enumerate(files) if not is_whole(file)]
        self.state.wait_for_everyone()  # all look before anyone writes, so that all share out the same parts
        return files, missing

    def my_share(self, numbers: list[int]) -> list[int]:
        """The parts of `numbers` that this process measures."""
        return numbers[self.state.process_index :: self.state.num_processes]


class MarginRewards:
    """Margin rewards of `questions` under a routed model's frozen base.

    The reward is the sigmoid of the margin, in nats over `MARGIN_SCALE`, by which the gold answer beats its best rival
    at its weakest token; 1/2 is the border between right and wrong under greedy decoding.

    Args:
        routed: a routed model in eval mode, on its device.
        questions: N questions with their gold answers.
        batch_size: questions per forward pass.
        store: keeps finished parts and shares the work among processes.
    """

    def __init__(
        self,
        routed: PreTrainedModel,
        questions: Sequence[Answered],
        batch_size: int = 64,
        store: RoundStore | None = None,
    ) -> None:
        self.routed = routed
        self.questions = questions
        self.batch_size = batch_size
        self.store = store
        order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt.input_ids))
        self._parts = [order[start : start + PART_QUESTIONS] for start in range(0, len(order), PART_QUESTIONS)]

    @torch.inference_mode()
    def around(
        self,
        paths: Sequence[Path],
        actions: Sequence[int] = (SKIP, EXECUTE),
        with_windows: bool = True,
        title: str = "measuring",
    ) -> RewardRound:
        """One `RewardRound` around `paths`, one path per question, with each block's action replaced by `actions`.

        Costs one pass along each path and, for each block and other action, one pass from that block on. With a store
        the main process's `paths` count, and parts that it holds are not measured again.

        Raises:
            UserError: when the store cannot be written.
        """
        paths = list(paths) if self.store is None else from_main(self.store.state, lambda: list(paths))
        parts = self._measured if self.store is None else self._stored
        return self._merged(paths, parts(paths, actions, with_windows, title), with_windows)

    def _measured(self, paths, actions, with_windows, title) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """(part, its tensors), all measured here."""
        with tqdm(total=len(self.questions), desc=title, unit="question") as progress:
            for number in range(len(self._parts)):
                yield number, self._measure_part(number, paths, actions, with_windows, progress)

    def _stored(self, paths, actions, with_windows, title) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """(part, its tensors), read from the store after this process has added its share of the missing ones."""
        store, config = self.store, self.routed.config
        asked = [[question.prompt.input_ids, question.answer_ids] for question in self.questions]
        key = {"asked": asked, "paths": paths, "actions": list(actions), "windows": with_windows}
        key |= {"num_windows": config.num_windows, "dtype": str(self.routed.dtype), "part": PART_QUESTIONS}
        files, missing = store.open(key, len(self._parts))
        mine = store.my_share(missing)
        share = " (first process's share)" if store.state.num_processes > 1 else ""
        total = sum(len(self._parts[number]) for number in mine)
        is_hidden = not store.state.is_main_process
        with tqdm(total=total, desc=title + share, unit="question", disable=is_hidden) as progress:
            for number in mine:
                write_tensors(files[number], self._measure_part(number, paths, actions, with_windows, progress))
        store.state.wait_for_everyone()
        for number, file in enumerate(files):
            yield number, load_file(file)

    def _measure_part(self, number, paths, actions, with_windows, progress: tqdm) -> dict[str, torch.Tensor]:
        batches = []
        for start in range(0, len(self._parts[number]), self.batch_size):
            indices = self._parts[number][start : start + self.batch_size]
            questions, around = [self.questions[i] for i in indices], [paths[i] for i in indices]
            batches.append(_measure_batch(self.routed, questions, around, actions, with_windows))
            progress.update(len(indices))
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def _merged(self, paths, parts, with_windows) -> RewardRound:
        """The parts in the order of the questions."""
        config = self.routed.config
        rewards = torch.full((len(self.questions), config.num_hidden_layers, NUM_ACTIONS), float("nan"))
        windows = mask = None
        if with_windows:
            shape = (len(self.questions), config.num_hidden_layers, config.num_windows)
            windows = torch.zeros(*shape, config.hidden_size, dtype=self.routed.dtype)
            mask = torch.zeros(len(self.questions), config.num_windows, dtype=torch.bool)
        for number, part in parts:
            rewards[self._parts[number]] = part["rewards"]
            if with_windows:
                windows[self._parts[number]], mask[self._parts[number]] = part["windows"], part["window_mask"]
        return RewardRound(paths, rewards, windows, mask)


def _measure_batch(
    routed, batch: list[Answered], paths: list[Path], actions: Sequence[int], with_windows: bool
) -> dict[str, torch.Tensor]:
    """The fields of a `RewardRound` for one batch."""
    ids, lengths, positions, targets = (tensor.to(routed.device) for tensor in _teacher_forced(batch))
    along = routed.model(
        input_ids=ids,
        layer_indices=[path_to_layer_indices(path) for path in paths],
        prompt_length=lengths,
        use_cache=False,
        output_hidden_states=True,
        output_router_inputs=with_windows,
    )

    # A head in bfloat16 would round logits to steps of an eighth of a nat, more than the effect of many blocks.
    head = routed.lm_head.weight.float()

    def reward(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        answers = hidden[torch.arange(len(rows), device=hidden.device)[:, None], positions[rows]]
        logits = F.linear(answers.float(), head)
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
                on_device = torch.tensor(rows, device=routed.device)
                inputs = along.hidden_states[block][on_device]
                hidden = routed.model(inputs_embeds=inputs, layer_indices=changed, use_cache=False).last_hidden_state
                rewards[rows, block, action] = reward(hidden, on_device)
    if not with_windows:
        return {"rewards": rewards}
    return {"rewards": rewards, "windows": along.router_inputs.cpu(), "window_mask": along.window_mask.cpu()}


def _teacher_forced(batch: list[Answered]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded prompt + answer [B, T]; prompt lengths [B]; for each answer token the position that predicts it and
    its id [B, A], the id -1 beyond the answer. Causal attention needs no mask for padding on the right."""
    rows = [(*answered.prompt.input_ids, *answered.answer_ids[:-1]) for answered in batch]
    ids = torch.zeros(len(batch), max(map(len, rows)), dtype=torch.long)
    longest = max(len(answered.answer_ids) for answered in batch)
    positions = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.full((len(batch), longest), -1)
    for row, (answered, tokens) in enumerate(zip(batch, rows, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        count = len(answered.answer_ids)
        positions[row, :count] = len(answered.prompt.input_ids) - 1 + torch.arange(count)
        targets[row, :count] = torch.tensor(answered.answer_ids)
    lengths = torch.tensor([len(answered.prompt.input_ids) for answered in batch])
    return ids, lengths, positions, targets
