"""Log-likelihoods of options along paths: one row per question, its context computed once.

A packed row holds the tokens that all options share, then each option's own. Positions restart after the shared part,
and the mask lets an option see the shared part and itself, so its scores are those of the option alone. A row starts at
the first block in which its path differs from the paths that were scored before: the hidden states that those paths
left before every `STATE_STRIDE`-th block are kept in memory, the least recently used ones are dropped first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm.attention import kernels_without_plans
from drllm.errors import UserError
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.sets import Question
from drllm.rollouts.batches import BatchLimit, BatchSize, run_in_batches
from drllm.rollouts.engine import Request, Rollout, not_finite
from train_models.paths import Path, path_to_layer_indices

STATE_STRIDE = 3  # blocks between kept hidden states
SHARED, PADDING = 0, -1  # segments of a packed row; options are 1, 2, ...


@dataclass(frozen=True)
class PackedRow:
    """A question's options in one row of T tokens.

    Attributes:
        tokens, positions, segments: [T] each.
        context: how many of the first tokens are the context, which routers read.
        option, read_at, target: one entry per scored token: its option, the place in the row whose logits predict it,
            and the token.
    """

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    context: int
    option: list[int]
    read_at: list[int]
    target: list[int]

    @classmethod
    def of(cls, prompt: LikelihoodPrompt) -> PackedRow:
        # The last token of a row predicts nothing that is scored, so it is not run.
        inputs = [row[:-1] for row in prompt.rows]
        shared = 0
        while all(len(row) > shared for row in inputs) and len({row[shared] for row in inputs}) == 1:
            shared += 1
        packed = cls(
            list(inputs[0][:shared]),
            list(range(shared)),
            [SHARED] * shared,
            min(shared, len(prompt.input_ids)),
            [],
            [],
            [],
        )
        for number, (row, scored) in enumerate(zip(prompt.rows, prompt.scored, strict=True)):
            start = len(packed.tokens)
            own = row[shared:-1]
            packed.tokens.extend(own)
            packed.positions.extend(range(shared, shared + len(own)))
            packed.segments.extend([number + 1] * len(own))
            for index in range(len(row) - scored, len(row)):
                packed.option.append(number)
                packed.read_at.append(index - 1 if index <= shared else start + index - 1 - shared)
                packed.target.append(row[index])
        return packed


class PackedBatch:
    """Packed rows, padded on the right to the longest: tensors on `device`."""

    def __init__(self, rows: Sequence[PackedRow], model: PreTrainedModel) -> None:
        device = model.device
        width = max(len(row.tokens) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            parts = [getattr(row, name) for row in rows]
            return torch.tensor([part + [value] * (width - len(part)) for part in parts], device=device)

        self.rows = rows
        self.width = width
        self.tokens = padded("tokens", 0)
        self.positions = padded("positions", 0)
        self.segments = padded("segments", PADDING)
        contexts = torch.tensor([row.context for row in rows], device=device)
        self.prompt_mask = torch.arange(width, device=device) < contexts[:, None]
        # The head is applied once to each place: all options begin at the same one.
        places = [(number, place) for number, row in enumerate(rows) for place in row.read_at]
        distinct = {place: index for index, place in enumerate(dict.fromkeys(places))}
        self._row_of, self._read_at = torch.tensor(list(distinct), device=device).unbind(1)
        self._logits_of = torch.tensor([distinct[place] for place in places], device=device)
        self._target = torch.tensor([token for row in rows for token in row.target], device=device)

    def masks(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """For each kind of attention of the model an additive mask [B, 1, T, T]."""
        segments, places = self.segments, torch.arange(self.width, device=self.segments.device)
        visible = (segments[:, None, :] == segments[:, :, None]) | (segments == SHARED)[:, None, :]
        visible &= places[None, :] <= places[:, None]
        masks = {"full_attention": visible}
        window = getattr(model.config, "sliding_window", None)
        if window is not None:
            distance = self.positions[:, :, None] - self.positions[:, None, :]
            masks["sliding_attention"] = visible & (distance < window)
        lowest = torch.finfo(model.dtype).min
        return {
            kind: torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, lowest)[:, None]
            for kind, mask in masks.items()
        }

    def option_scores(self, hidden: torch.Tensor, head: torch.nn.Linear) -> list[tuple[float, ...]]:
        """Summed log-probabilities in nats, one tuple per row with one value per option.

        Args:
            hidden: [B, T, d], after the final norm.
            head: the language-model head.
        """
        logits = F.linear(hidden[self._row_of, self._read_at], head.weight).float()
        values = (logits[self._logits_of, self._target] - logits.logsumexp(-1)[self._logits_of]).double().tolist()
        scores, start = [], 0
        for row in self.rows:
            sums = [0.0] * (max(row.option) + 1)
            for option, value in zip(row.option, values[start : start + len(row.option)], strict=True):
                sums[option] += value
            start += len(row.option)
            scores.append(tuple(sums))
        return scores


def choice_of(prompt: LikelihoodPrompt, scores: Sequence[float], normalised: bool) -> Rollout:
    """What the scores of a question say: the label of the most probable option, and whether the question is right."""
    values = prompt.values(scores, normalised)
    chosen = prompt.question.labels[max(range(len(values)), key=values.__getitem__)]
    return Rollout(chosen, prompt.is_right(scores, normalised))


class LikelihoodEngine:
    """Scores the options of questions along paths; the counterpart of `RolloutEngine` for a log-likelihood reward.

    Args:
        model: follows `layer_indices` (`data_models.load_path_model`), on its device, with sdpa or eager attention.
        tokenizer: the model's.
        batch_size: most rows of a batch, or its limit; halved, with one line on stderr, when memory runs out.
        normalised: the reward is lm-eval's `acc_norm` instead of its `acc`.
        state_bytes: memory for hidden states that later rollouts start from; 0 starts every rollout at block 0, None
            leaves it to the limit.

    Attributes:
        rollouts, block_tokens: rollouts done, and block applications times tokens that they took.

    Raises:
        UserError: for other attention back ends, which cannot take the mask of packed rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: BatchSize,
        normalised: bool = False,
        state_bytes: int | None = None,
    ) -> None:
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise UserError(
                f"a log-likelihood reward packs options into one row, which attention "
                f"{model.config._attn_implementation!r} cannot mask; use sdpa"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.limit = BatchLimit.of(batch_size)
        self.normalised = normalised
        self.num_blocks = model.config.num_hidden_layers
        self.rollouts = 0
        self.block_tokens = 0
        self._state_bytes = self.limit.state_bytes if state_bytes is None else state_bytes
        self._held_bytes = 0
        # (question id, path up to a block) -> that block's input [T, d]
        self._states: OrderedDict[tuple[str, Path], torch.Tensor] = OrderedDict()
        self._packed: dict[str, PackedRow] = {}

    @property
    def batch_size(self) -> int:
        """Most rows of a batch."""
        return self.limit.rows

    def respond(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in the order of `requests`: the label of the chosen option, and the reward."""
        pairs = zip(requests, self.score(requests), strict=True)
        return [choice_of(request.prompt, scores, self.normalised) for request, scores in pairs]

    def score(self, requests: Sequence[Request]) -> list[tuple[float, ...]]:
        """Summed log-probabilities in nats, one tuple per request with one value per option."""
        scores: list[tuple[float, ...]] = [()] * len(requests)

        def run(places: list[int]) -> None:
            for place, result in zip(places, self._run([requests[place] for place in places]), strict=True):
                scores[place] = result

        def width(place: int) -> int:
            return len(self._row(requests[place].prompt).tokens)

        run_in_batches(range(len(requests)), width, self.limit, run, self._make_room)
        return scores

    def forget(self, question: Question) -> None:
        """Frees the memory that `question` holds; call it when its search is over."""
        for key in [key for key in self._states if key[0] == question.id]:
            self._held_bytes -= self._states.pop(key).nbytes
        self._packed.pop(question.id, None)

    def _row(self, prompt: LikelihoodPrompt) -> PackedRow:
        if prompt.question.id not in self._packed:
            self._packed[prompt.question.id] = PackedRow.of(prompt)
        return self._packed[prompt.question.id]

    @kernels_without_plans()
    @torch.inference_mode()
    def _run(self, requests: list[Request]) -> list[tuple[float, ...]]:
        """Scores one batch."""
        batch = PackedBatch([self._row(request.prompt) for request in requests], self.model)
        paths = [request.path for request in requests]
        ids = [request.prompt.question.id for request in requests]
        inputs = self.model.get_input_embeddings()(batch.tokens)
        starts = []
        for row, (question_id, path) in enumerate(zip(ids, paths, strict=True)):
            start = self._longest_known(question_id, path)
            if start:
                state = self._states[question_id, path[:start]]
                self._states.move_to_end((question_id, path[:start]))
                inputs[row, : len(state)] = state
            starts.append(start)
        output = self.model.model(
            inputs_embeds=inputs,
            attention_mask=batch.masks(self.model),
            position_ids=batch.positions,
            # Blocks below the start are skipped here: their output is what `inputs` holds.
            layer_indices=[
                path_to_layer_indices((0,) * start + path[start:]) for start, path in zip(starts, paths, strict=True)
            ],
            use_cache=False,
            output_hidden_states=self._state_bytes > 0,
        )
        self.rollouts += len(requests)
        for row, (path, start) in enumerate(zip(paths, starts, strict=True)):
            self.block_tokens += sum(path[start:]) * len(batch.rows[row].tokens)
        if self._state_bytes > 0:
            self._keep(batch, ids, paths, starts, output.hidden_states)
        scores = batch.option_scores(output.last_hidden_state, self.model.lm_head)
        for request, values in zip(requests, scores, strict=True):
            if not all(map(math.isfinite, values)):
                raise UserError(not_finite("log-likelihoods", request, self.model))
        return scores

    def _longest_known(self, question_id: str, path: Path) -> int:
        for start in range((self.num_blocks - 1) // STATE_STRIDE * STATE_STRIDE, 0, -STATE_STRIDE):
            if (question_id, path[:start]) in self._states:
                return start
        return 0

    def _keep(self, batch: PackedBatch, ids, paths, starts, hidden_states: Sequence[torch.Tensor]) -> None:
        for row, (question_id, path, start) in enumerate(zip(ids, paths, starts, strict=True)):
            length = len(batch.rows[row].tokens)
            for block in range(start + STATE_STRIDE, self.num_blocks, STATE_STRIDE):
                if (question_id, path[:block]) not in self._states:
                    state = hidden_states[block][row, :length].clone()
                    self._states[question_id, path[:block]] = state
                    self._held_bytes += state.nbytes
        while self._held_bytes > self._state_bytes:
            self._held_bytes -= self._states.popitem(last=False)[1].nbytes

    def _make_room(self, places: list[int]) -> bool:
        """Drops the hidden states; whether one row is worth another try without them."""
        held_states = bool(self._states)
        self._states.clear()
        self._held_bytes = 0
        if len(places) == 1 and not held_states:
            raise UserError("one question runs out of memory; free some, use a smaller dtype or a larger device")
        return len(places) == 1
