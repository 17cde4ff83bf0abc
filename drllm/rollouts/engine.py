"""Batched rollouts: what a model answers along a path, for many questions and paths at once.

The published search ran one rollout at a time, batch 1. Here hundreds of searches run side by side; each asks for one
reward at a time (`drllm.search`), the requests are gathered into batches of (question, path), and each block runs once
over all rows that use it. Two shortcuts, which change answers by rounding at most, pay for themselves
(`benchmarks/search.py`):

* A row leaves the batch as soon as its reward is settled: at EOS, or when no continuation changes the grade.
* Below its first edited block a path is the default path. The hidden states and the keys and values of the default
  path, computed once a question, are kept, and each later rollout starts at its first edited block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm.attention import kernels_without_plans
from drllm.errors import UserError
from drllm.questions.padding import pad_ids
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from drllm.rollouts.background import BackgroundGrader, Rollout
from drllm.rollouts.batches import BatchLimit, BatchSize, run_in_batches
from drllm.rollouts.default_states import STRIDE_ON_GPU, DefaultStates
from drllm.rollouts.step_graphs import DecodingSteps, Steps
from train_models.cache import PathCache
from train_models.paths import Path, default_path, path_to_layer_indices

# Ended rows are dropped from the cache once they are this share of it, else 0.5: dropping copies the rest, and on a GPU
# a step costs launches rather than rows.
COMPACT_SHARE = {"cpu": 0.25}


@dataclass(frozen=True)
class Request:
    """One rollout: the response to `prompt` along `path`. `to_the_end`: also after the reward is settled."""

    prompt: Prompt
    path: Path
    to_the_end: bool = False


@dataclass
class _Row:
    """One request while its batch runs."""

    request: Request
    place: int  # of the request in the caller's list
    tokens: list[int] = field(default_factory=list)


class RolloutEngine:
    """Runs requests of any number in batches of at most `batch_size` rows, greedily, and grades them.

    Args:
        model: follows `layer_indices` (`data_models.load_path_model`), on its device. On a GPU it decodes from graphs
            (`step_graphs`) where it can.
        tokenizer: the model's.
        batch_size: most rows of a batch, or its limit; halved, with one line on stderr, when memory runs out.
        reuse_default_states: start rollouts at their first edited block, or a few blocks earlier on a GPU. Costs
            L T (d / stride + 2 d_kv) values a question that is being searched; `forget` gives them back.

    Attributes:
        rollouts, block_tokens: rollouts done, and block applications times tokens that they took.
        grader: grades the responses of one batch while the next one runs.
        steps: decodes from graphs; None where decoding steps are launched kernel by kernel.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: BatchSize,
        reuse_default_states: bool = True,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.limit = BatchLimit.of(batch_size)
        self.num_blocks = model.config.num_hidden_layers
        self.end_ids = _end_ids(model, tokenizer)
        # A sliding layer's cache forgets the start of long prompts, so its keys cannot be put together from parts.
        sliding = any(layer.is_sliding for layer in PathCache(model.config).layers)
        self.reuse_default_states = reuse_default_states and not sliding
        self.rollouts = 0
        self.block_tokens = 0
        self.grader = BackgroundGrader()
        self.steps = DecodingSteps.of(model)
        self._default_states = DefaultStates(1 if model.device.type == "cpu" else STRIDE_ON_GPU)
        # What is known of the responses of the questions being searched, by question id and tokens: there are few.
        self._settled: dict[str, dict[tuple[int, ...], bool]] = {}
        self._graded: dict[str, dict[tuple[int, ...], Future[Rollout]]] = {}

    @property
    def batch_size(self) -> int:
        """Most rows of a batch."""
        return self.limit.rows

    def respond(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout a request, in the order of `requests`, which may hold any mixture of questions and paths."""
        rollouts: list[Future[Rollout]] = [Future()] * len(requests)
        rows = [_Row(request, place) for place, request in enumerate(requests)]
        default = default_path(self.num_blocks)

        def run(batch: list[_Row]) -> None:
            self._run(batch)
            for row in batch:
                rollouts[row.place] = self._grade(row.request.prompt, tuple(row.tokens))

        for kind in (True, False):  # default paths by themselves: they run everything, and their states are kept
            of_kind = [row for row in rows if (row.request.path == default) == kind]
            run_in_batches(of_kind, lambda row: row.request.prompt.total_tokens, self.limit, run, self._make_room)
        return self.grader.results(rollouts)

    def score(self, requests: Sequence[Request]) -> list[tuple[float, ...]]:
        """Per request (whether the response is right, whether it holds an answer), each 1.0 or 0.0."""
        return [rollout.scores for rollout in self.respond(requests)]

    def forget(self, question: Question) -> None:
        """Gives back the memory that `question` holds; call it when its search is over."""
        self._default_states.forget(question.id)
        self._settled.pop(question.id, None)
        self._graded.pop(question.id, None)

    @kernels_without_plans()
    @torch.inference_mode()
    def _run(self, batch: list[_Row]) -> None:
        """Greedy decoding of one batch; fills `tokens` of each row."""
        for row in batch:
            row.tokens = []
        active = list(batch)
        widths = {len(row.request.prompt.input_ids) for row in active}
        padded = pad_ids([row.request.prompt.input_ids for row in active], 0, self.model.device)
        mask, is_padded = padded["attention_mask"], len(widths) > 1
        logits, cache = self._prefill(active, padded["input_ids"], mask, is_padded)
        for row, is_finite in zip(active, logits.isfinite().all(-1).tolist(), strict=True):
            # An edited path may overflow: then its answer is wrong. If the base model does, no reward means anything.
            if not is_finite and row.request.path == default_path(len(row.request.path)):
                raise UserError(not_finite("logits", row.request, self.model))
        first = logits.argmax(-1)
        self.rollouts += len(batch)
        ended = self._note(active, first.tolist())
        steps = None
        if self.steps is not None and len(ended) < len(active):
            most = max(row.request.prompt.max_new_tokens for row in batch)
            eager = functools.partial(self._step, first, self._after(mask), is_padded, cache)
            steps = self.steps.start(cache, mask, first, most, eager)
        if steps is None:
            self._decode(active, ended, first, mask, is_padded, cache)
        else:
            del cache, eager  # their memory serves others
            self._replay(active, ended, steps)

    def _decode(
        self,
        active: list[_Row],
        ended: list[int],
        tokens: torch.Tensor,
        mask: torch.Tensor,
        is_padded: bool,
        cache: PathCache,
    ) -> None:
        """Steps until all rows have ended; rows that have leave the batch."""
        compact_share = COMPACT_SHARE.get(mask.device.type, 0.5)
        while len(ended) < len(active):
            if len(ended) >= compact_share * len(active):
                kept = torch.tensor(sorted(set(range(len(active))) - set(ended)), device=mask.device)
                cache.batch_select_indices(kept)
                mask, tokens = mask[kept], tokens[kept]
                active = [active[place] for place in kept.tolist()]
            mask = self._after(mask)
            self.block_tokens += sum(sum(row.request.path) for row in active)
            tokens = self._step(tokens, mask, is_padded, cache).argmax(-1)
            ended = self._note(active, tokens.tolist())

    def _replay(self, rows: list[_Row], ended: list[int], steps: Steps) -> None:
        """Steps from a graph until all rows have ended."""
        tokens = steps.step()
        while len(ended) < len(rows):
            ran = sum(sum(row.request.path) for row in rows) - sum(sum(rows[place].request.path) for place in ended)
            self.block_tokens += ran
            arrived, tokens = tokens(), steps.step()  # which runs while the host looks at the tokens before it
            ended = self._note(rows, arrived)

    def _note(self, rows: list[_Row], tokens: list[int]) -> list[int]:
        """Appends a token to each row that has not ended; the places of those that have now."""
        ended = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if not self._has_ended(row):
                row.tokens.append(token)
            if self._has_ended(row):
                ended.append(place)
        return ended

    @staticmethod
    def _after(mask: torch.Tensor) -> torch.Tensor:
        """`mask` with one more token per row."""
        return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

    def _step(self, tokens: torch.Tensor, mask: torch.Tensor, is_padded: bool, cache: PathCache) -> torch.Tensor:
        """Next-token logits [B, V] after `tokens` [B], which `mask` counts already."""
        return self.model(
            input_ids=tokens[:, None],
            attention_mask=mask if is_padded else None,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _prefill(
        self, rows: list[_Row], ids: torch.Tensor, mask: torch.Tensor, is_padded: bool
    ) -> tuple[torch.Tensor, PathCache]:
        """Next-token logits [B, V] and the filled cache. Each row starts at its first edited block where it can."""
        paths = [row.request.path for row in rows]
        prompts = [row.request.prompt for row in rows]
        embeddings = self.model.get_input_embeddings()(ids)
        question_ids = [prompt.question.id for prompt in prompts]
        starts = self._default_states.starts(question_ids, paths)
        if any(starts):
            places = self._default_states.begin(embeddings, question_ids, starts)
        keep_states = self.reuse_default_states and all(path == default_path(self.num_blocks) for path in paths)
        cache = PathCache()
        output = self.model(
            inputs_embeds=embeddings,
            attention_mask=mask if is_padded else None,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            # Blocks below the start are skipped here: their output is what `embeddings` holds.
            layer_indices=[
                path_to_layer_indices((0,) * start + path[start:]) for start, path in zip(starts, paths, strict=True)
            ],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=list(range(0, self.num_blocks, self._default_states.stride)) if keep_states else False,
        )
        for path, start, prompt in zip(paths, starts, prompts, strict=True):
            self.block_tokens += (sum(path) - start) * len(prompt.input_ids)
        if keep_states:
            self._default_states.keep(question_ids, mask, output.hidden_states, cache)
        if any(starts):
            self._default_states.complete(cache, paths, starts, places)
        return output.logits[:, -1], cache

    def _has_ended(self, row: _Row) -> bool:
        if row.tokens and row.tokens[-1] in self.end_ids:
            return True
        if len(row.tokens) >= row.request.prompt.max_new_tokens:
            return True
        if not row.tokens or row.request.to_the_end:
            return False
        return self._is_settled(row.request.prompt, tuple(row.tokens))

    def _is_settled(self, prompt: Prompt, tokens: tuple[int, ...]) -> bool:
        """Whether the reward of a response that begins with `tokens` is the same for every continuation."""
        known = self._settled.setdefault(prompt.question.id, {})
        if tokens not in known:
            response = self.tokenizer.decode(tokens, skip_special_tokens=True)
            known[tokens] = prompt.response_format.is_settled(prompt.question, response)
        return known[tokens]

    def _grade(self, prompt: Prompt, tokens: tuple[int, ...]) -> Future[Rollout]:
        known = self._graded.setdefault(prompt.question.id, {})
        if tokens not in known:
            known[tokens] = self.grader.submit(prompt, self.tokenizer.decode(tokens, skip_special_tokens=True))
        return known[tokens]

    def _make_room(self, batch: list[_Row]) -> bool:
        """Drops the states of default paths, which are only a shortcut; whether one row is worth another try then."""
        held_states = self._default_states.clear()  # rollouts start at block 0 again
        if self.steps is not None:
            self.steps.clear()
        if len(batch) == 1 and not held_states:
            length = len(batch[0].request.prompt.input_ids)
            raise UserError(
                f"one prompt of {length} tokens runs out of memory; free some, use a smaller dtype or a larger device"
            )
        return len(batch) == 1


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which `generate` stops: those of the generation config, else the tokenizer's."""
    configured = model.generation_config.eos_token_id
    if configured is None:
        configured = tokenizer.eos_token_id
    return set(configured if isinstance(configured, list) else [configured]) - {None}


def not_finite(what: str, request: Request, model: PreTrainedModel) -> str:
    """The sentence about NaN or infinite logits or scores of a request."""
    path = "".join(map(str, request.path))
    return (
        f"question {request.prompt.question.id}: the {what} along the path {path} are NaN or infinite; the activations "
        f"of the model overflow in {model.dtype}, try --dtype bfloat16 or float32"
    )
