"""The reward of an answer with a margin, and what each block of each question does to it.

A round (`measure`) asks, around one path a question, what becomes of the reward when one block's action is replaced,
block by block, and notes what the routers read on the unchanged path. With a `RoundStore` its parts are kept on disk
as they are done: a stopped run measures nothing twice, and several processes share the work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm.errors import UserError
from drllm.files import is_whole
from drllm.processes import from_main
from drllm.questions.prompts import Prompt
from drllm.questions.sets import SETS
from train_models.paths import EXECUTE, SKIP, Path, path_to_layer_indices

NUM_ACTIONS = 3
MARGIN_SCALE = 0.3  # nats of margin a unit of the sigmoid's argument
PART_QUESTIONS = 512  # of a file of the store: what a kill may lose


@dataclass(frozen=True)
class Answered:
    """A prompt and the tokens of its right answer, in the form the model is asked for."""

    prompt: Prompt
    answer_ids: tuple[int, ...]

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Answered:
        question = prompt.question
        is_math = SETS[question.set].kind == "math"
        text = f" \\boxed{{{question.answer}}}" if is_math else f" {question.answer}"
        answer_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return cls(prompt, tuple(answer_ids))


@dataclass
class EffectRound:
    """What one round measured around `paths`.

    rewards: float32 [N, L, 3] with block l's action replaced; nan where it was not asked or no block would run.
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
    """Where the parts of rounds are kept, and the processes that share them out.

    folder: on a disk that all processes see; a subfolder a round, named after all that the round depends on.
    model_fingerprint: of the base weights.
    """

    folder: FilePath
    model_fingerprint: str
    state: PartialState

    def open(self, key: dict, count: int) -> tuple[list[FilePath], list[int]]:
        """(the files of parts 0 to `count` - 1 of the round `key`, the numbers of those that are missing)."""
        text = json.dumps({"model_fingerprint": self.model_fingerprint, **key})
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        files = [folder / f"{number:05d}-of-{count:05d}.safetensors" for number in range(count)]
        with self._disk_errors():
            folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number, file in enumerate(files) if not is_whole(file)]
        self.state.wait_for_everyone()  # all look before anyone writes, and so share out the same parts
        return files, missing

    def write(self, file: FilePath, part: dict[str, torch.Tensor]) -> None:
        """Whole or not at all."""
        partial = file.with_suffix(f".{os.getpid()}.partial")
        with self._disk_errors():
            save_file(part, partial)
            os.replace(partial, file)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder} cannot be written to ({error}); make room or name another folder") from None


@torch.inference_mode()
def measure(
    routed: PreTrainedModel,
    questions: Sequence[Answered],
    paths: Sequence[Path],
    batch_size: int = 64,
    actions: Sequence[int] = (SKIP, EXECUTE),
    with_windows: bool = True,
    store: RoundStore | None = None,
    title: str = "measuring",
) -> EffectRound:
    """One `EffectRound` over `questions` around `paths`, one path each, with each block's action replaced by `actions`.

    Costs a pass along each path and, for each block and other action, one from that block on. With a store the main
    process's `paths` count, and parts that it holds are not measured again.
    """
    paths = list(paths) if store is None else from_main(store.state, lambda: list(paths))
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt.input_ids))
    parts = [order[start : start + PART_QUESTIONS] for start in range(0, len(order), PART_QUESTIONS)]
    config = routed.config
    rewards = torch.full((len(questions), config.num_hidden_layers, NUM_ACTIONS), float("nan"))
    windows = mask = None
    if with_windows:
        shape = (len(questions), config.num_hidden_layers, config.num_windows)
        windows = torch.zeros(*shape, config.hidden_size, dtype=routed.dtype)
        mask = torch.zeros(len(questions), config.num_windows, dtype=torch.bool)

    def make(number: int, progress: tqdm) -> dict[str, torch.Tensor]:
        found = []
        for start in range(0, len(parts[number]), batch_size):
            batch = parts[number][start : start + batch_size]
            asked, around = [questions[i] for i in batch], [paths[i] for i in batch]
            found.append(_measure_batch(routed, asked, around, actions, with_windows))
            progress.update(len(batch))
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    def take(number: int, part: dict[str, torch.Tensor]) -> None:
        rewards[parts[number]] = part["rewards"]
        if with_windows:
            windows[parts[number]], mask[parts[number]] = part["windows"], part["window_mask"]

    if store is None:
        with tqdm(total=len(questions), desc=title, unit="question") as progress:
            for number in range(len(parts)):
                take(number, make(number, progress))
        return EffectRound(paths, rewards, windows, mask)

    asked = [[each.prompt.input_ids, each.answer_ids] for each in questions]
    key = {"asked": asked, "paths": paths, "actions": list(actions), "windows": with_windows}
    key |= {"num_windows": config.num_windows, "dtype": str(routed.dtype), "part": PART_QUESTIONS}
    files, missing = store.open(key, len(parts))
    mine = missing[store.state.process_index :: store.state.num_processes]
    whose = " (first process's share)" if store.state.num_processes > 1 else ""
    total = sum(len(parts[number]) for number in mine)
    with tqdm(total=total, desc=title + whose, unit="question", disable=not store.state.is_main_process) as progress:
        for number in mine:
            store.write(files[number], make(number, progress))
    store.state.wait_for_everyone()
    for number, file in enumerate(files):
        take(number, load_file(file))
    return EffectRound(paths, rewards, windows, mask)


def _measure_batch(
    routed, batch: list[Answered], paths: list[Path], actions: Sequence[int], with_windows: bool
) -> dict[str, torch.Tensor]:
    """The fields of an `EffectRound` for a batch."""
    ids, length, places, targets = (each.to(routed.device) for each in _teacher_forced(batch))
    along = routed.model(
        input_ids=ids,
        layer_indices=[path_to_layer_indices(path) for path in paths],
        prompt_length=length,
        use_cache=False,
        output_hidden_states=True,
        output_router_inputs=with_windows,
    )

    # A head in bfloat16 would round logits to steps of an eighth of a nat, which is more than many an effect.
    head = routed.lm_head.weight.float()

    def reward(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        answers = hidden[torch.arange(len(rows), device=hidden.device)[:, None], places[rows]]
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
                there = torch.tensor(rows, device=routed.device)
                inputs = along.hidden_states[block][there]
                hidden = routed.model(inputs_embeds=inputs, layer_indices=changed, use_cache=False).last_hidden_state
                rewards[rows, block, action] = reward(hidden, there)
    if not with_windows:
        return {"rewards": rewards}
    return {"rewards": rewards, "windows": along.router_inputs.cpu(), "window_mask": along.window_mask.cpu()}


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
