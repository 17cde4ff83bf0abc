"""The likelihood reward of paths, for multiple-choice questions.

The counterpart of `MarginRewards` for `--reward likelihood`. The reward is the probability of the right option among
the options. It changes with every edit of a path, where lm-eval's `acc` mostly stays as it was, so the effect of an
edit on it has half the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedModel

from drllm.files import write_tensors
from drllm.group_paths.margin_rewards import PART_QUESTIONS, RoundStore
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.rollouts.likelihood import LikelihoodEngine
from drllm.rollouts.routed_paths import router_windows
from drllm.rollouts.scores import ScoreStore, score_all
from train_models.paths import Path

CHUNK = 64  # questions of similar length that are scored one after the other


class LikelihoodRewards:
    """Likelihood rewards of N questions under a routed model's frozen base.

    Args:
        routed: a routed model in eval mode, on its device.
        prompts: the questions; `sets` of them need not be sorted.
        store: keeps every score; a resumed run scores nothing twice.
        state: the processes that share the work.
        batch_size: questions per forward pass.
        normalised: option log-probabilities are divided by their characters (`acc_norm`).
    """

    def __init__(
        self,
        routed: PreTrainedModel,
        prompts: Sequence[LikelihoodPrompt],
        store: ScoreStore,
        state: PartialState,
        batch_size: int = 8,
        normalised: bool = False,
    ) -> None:
        self.routed = routed
        self.prompts = prompts
        self.batch_size = batch_size
        self.normalised = normalised
        self.state = state
        self._scores = store
        self._engine = LikelihoodEngine(routed, None, batch_size, normalised)
        # Neighbours of similar length need little padding; chunks keep the order of the questions otherwise.
        self._order = [
            index
            for start in range(0, len(prompts), CHUNK)
            for index in sorted(
                range(start, min(start + CHUNK, len(prompts))), key=lambda index: len(prompts[index].input_ids)
            )
        ]

    def reward(self, prompt: LikelihoodPrompt, path: Path) -> float:
        """The reward of a scored path, in [0, 1]; NaN where it was not scored."""
        scores = self._scores.get(prompt.question.id, path)
        return math.nan if scores is None else prompt.probability(scores, self.normalised)

    def is_right(self, prompt: LikelihoodPrompt, path: Path) -> bool:
        """Whether the right option wins along a scored path."""
        return prompt.is_right(self._scores.get(prompt.question.id, path), self.normalised)

    def score(self, work: Sequence[Sequence[Path]], title: str) -> None:
        """Scores the paths `work[n]` of question n, as far as they are not known; every process calls this."""
        ordered = [(self.prompts[index], work[index]) for index in self._order if work[index]]
        share = {"rank": self.state.process_index, "num_processes": self.state.num_processes}
        score_all(self._engine, ordered, self._scores, title, **share)
        self.state.wait_for_everyone()
        self._scores.update()

    def windows(self, paths: Sequence[Path]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the routers read of each context along its path: [N, L, W, d] and bool [N, W], on the CPU.

        Every process calls this and reads its share, which is kept beside the scores. The main process gets the result,
        the others None.
        """
        config = self.routed.config
        parts = [self._order[start : start + PART_QUESTIONS] for start in range(0, len(self._order), PART_QUESTIONS)]
        asked = [[prompt.input_ids, path] for prompt, path in zip(self.prompts, paths, strict=True)]
        store = RoundStore(self._scores.folder / "windows", str(self._scores.key), self.state)
        files, missing = store.open({"asked": asked, "num_windows": config.num_windows}, len(parts))
        mine = store.my_share(missing)
        total, is_hidden = sum(len(parts[number]) for number in mine), not self.state.is_main_process
        with tqdm(total=total, desc="hidden states of the prompts", unit="question", disable=is_hidden) as progress:
            for number in mine:
                write_tensors(files[number], self._windows_of(parts[number], paths, progress))
        self.state.wait_for_everyone()
        if is_hidden:
            return None
        shape = (len(self.prompts), config.num_hidden_layers, config.num_windows)
        windows = torch.zeros(*shape, config.hidden_size, dtype=self.routed.dtype)
        mask = torch.zeros(len(self.prompts), config.num_windows, dtype=torch.bool)
        for rows, file in zip(parts, files, strict=True):
            part = load_file(file)
            windows[rows], mask[rows] = part["windows"], part["window_mask"]
        return windows, mask

    def _windows_of(self, rows: Sequence[int], paths: Sequence[Path], progress: tqdm) -> dict[str, torch.Tensor]:
        windows, masks = [], []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            input_ids, own = [self.prompts[index].input_ids for index in chunk], [paths[index] for index in chunk]
            read = router_windows(self.routed, input_ids, own, self.batch_size, title=None)
            windows.append(read[0])
            masks.append(read[1])
            progress.update(len(chunk))
        return {"windows": torch.cat(windows), "window_mask": torch.cat(masks)}
