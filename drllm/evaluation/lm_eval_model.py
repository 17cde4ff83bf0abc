"""`drllm`, a model type for lm-eval: routed checkpoints, plain ones and fixed paths, with layers counted.

What it adds to lm-eval's own `hf`, which it subclasses:

* Routers read the prompt only, in log-likelihood tasks too, so that all options of a question follow one path
  and no result depends on the batch size.
* The prompt of a question is computed once for all its options.
* Block applications are counted for each query, and the skip / execute / repeat share for each block and task;
  both are part of lm-eval's results JSON (`config.block_applications`) and, query by query, of `routing_log`.
* Answers are cached together with their counts, under a key that holds the weights and the routing settings.

Importing this module registers the class with lm-eval; `python -m drllm.evaluate` does so and hands over to
lm-eval's command line.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from data_models import path_model_class
from drllm.errors import UserError
from drllm.provenance import fingerprint
from drllm.questions.prompts import TEMPLATE_ARGUMENTS
from train_models import PathCache, routed_classes
from train_models.paths import EXECUTE, REPEAT, SKIP, path_to_layer_indices

ROUTED_PREFIX = "drllm_"
ROUTING_ARGUMENTS = ("num_windows", "routing_control", "is_static_routing")
# Options of one question are scored together; this bounds the rows of such a batch, per context in it.
OPTIONS_PER_CONTEXT = 8


@dataclass(frozen=True)
class Measurement:
    """What answering one request took.

    `context` identifies the prompt: its prefill, `prefill_blocks` block applications in one forward pass, is
    shared by all requests of a query with the same context; None for a prefill of the request's own. `blocks` and
    `passes` are the request's later forward passes. `path` has one digit (0, 1, 2) a block.
    """

    context: str | None
    path: str
    prefill_blocks: int
    blocks: int
    passes: int


class LayerCounts:
    """Block applications by query; a query is one document of one task."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], dict[tuple[str, int], Measurement]] = defaultdict(dict)

    def add(self, task: str, doc_id: int, index: tuple[str, int], measurement: Measurement) -> None:
        """Notes the request (kind, number) of a document; one that is run twice counts once."""
        self._requests[task, doc_id][index] = measurement

    def queries(self) -> Iterator[dict[str, Any]]:
        """One record a query: task, doc_id, blocks, passes (prefills included) and the distinct paths."""
        for (task, doc_id), requests in sorted(self._requests.items()):
            prefills = {request.context or index: request for index, request in requests.items()}
            yield {
                "task": task,
                "doc_id": doc_id,
                "blocks": sum(request.prefill_blocks for request in prefills.values())
                + sum(request.blocks for request in requests.values()),
                "passes": len(prefills) + sum(request.passes for request in requests.values()),
                "paths": sorted({request.path for request in requests.values()}),
            }

    def summary(self) -> dict[str, dict[str, Any]]:
        """By task: queries, blocks and passes a query (mean, standard error), blocks a pass, shares by block."""
        by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for query in self.queries():
            by_task[query["task"]].append(query)
        return {task: _summary(queries) for task, queries in by_task.items()}


def _summary(queries: list[dict[str, Any]]) -> dict[str, Any]:
    blocks = torch.tensor([query["blocks"] for query in queries], dtype=torch.float64)
    passes = sum(query["passes"] for query in queries)
    # Each query weighs the same, whatever the number of its contexts.
    shares = torch.stack(
        [
            torch.tensor([[int(visits) for visits in path] for path in query["paths"]])[..., None]
            .eq(torch.tensor([SKIP, EXECUTE, REPEAT]))
            .double()
            .mean(0)
            for query in queries
        ]
    ).mean(0)
    return {
        "queries": len(queries),
        "blocks": int(blocks.sum()),
        "forward_passes": passes,
        "blocks_per_query": float(blocks.mean()),
        "blocks_per_query_stderr": float(blocks.std() / len(blocks) ** 0.5) if len(blocks) > 1 else None,
        "blocks_per_pass": float(blocks.sum()) / passes,
        "share": dict(zip(("skip", "execute", "repeat"), shares.mean(0).tolist(), strict=True)),
        "share_per_block": {
            name: shares[:, action].tolist() for action, name in enumerate(("skip", "execute", "repeat"))
        },
    }


def _is_sampled(kind: str, arguments: Sequence[Any]) -> bool:
    """Whether asking again gives another answer; as `lm_eval.models.utils.normalize_gen_kwargs` reads the arguments."""
    if kind != "generate_until":
        return False
    sampling = arguments[1].get("do_sample")
    return float(arguments[1].get("temperature") or 0) > 0 if sampling is None else bool(sampling)


class _Answers:
    """Stands in for lm-eval's cache hook: pairs each answer with what it took, and keeps both on disk if asked to."""

    def __init__(self, path: str | None, identity: str) -> None:
        self._identity = identity
        self._stored: Any = {}
        if path is not None:
            from sqlitedict import SqliteDict

            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._stored = SqliteDict(path, autocommit=True)
        self._is_persistent = path is not None
        self._drawn: dict[str, deque] = defaultdict(deque)  # of sampled requests: each repeat has an answer of its own
        self.pending: deque[Measurement] = deque()  # of the rows that lm-eval is about to report, in order

    def key(self, kind: str, arguments: Sequence[Any]) -> str:
        return f"{self._identity}:{hash_args(kind, arguments)}"

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Called by lm-eval with each answer."""
        if self.pending:
            found = (answer, self.pending.popleft())
            if _is_sampled(kind, arguments):
                self._drawn[self.key(kind, arguments)].append(found)
            else:
                self._stored[self.key(kind, arguments)] = found

    def get(self, kind: str, arguments: Sequence[Any]) -> tuple[Any, Any] | None:
        """The answer and the measurement, or list of them, of what it took, if it is known."""
        if _is_sampled(kind, arguments):
            drawn = self._drawn[self.key(kind, arguments)]
            return drawn.popleft() if drawn else None
        return self._stored.get(self.key(kind, arguments))

    def put(self, kind: str, arguments: Sequence[Any], answer: Any, measurement: Any) -> None:
        self._stored[self.key(kind, arguments)] = (answer, measurement)

    def forget(self) -> None:
        """Drops what was kept for the current requests, unless it is on disk."""
        if not self._is_persistent:
            self._stored = {}


@register_model("drllm")
class RoutedLM(HFLM):
    """lm-eval's `hf` for models that follow paths.

    Further `--model_args`:
        pretrained: a routed checkpoint, or a plain Llama, Qwen2 or Qwen3 one (then every block runs once).
        num_windows, routing_control, is_static_routing: override those of a routed checkpoint.
        path: one path for every query, a digit (0, 1, 2) a block: a static control.
        routing_log: file for one JSON line a query: task, doc_id, blocks, passes, paths.
        response_cache: SQLite file of answers and counts; what `--use_cache` becomes under `drllm.evaluate`.
    """

    def __init__(
        self,
        pretrained: str,
        path: str | int | None = None,
        routing_log: str | None = None,
        response_cache: str | None = None,
        trust_remote_code: bool | None = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(pretrained, str):
            raise UserError("the lm-eval model drllm takes pretrained=NAME_OR_PATH, not a model object")
        self._routing = {name: kwargs.pop(name) for name in ROUTING_ARGUMENTS if name in kwargs}
        kwargs["chat_template_args"] = TEMPLATE_ARGUMENTS | (kwargs.get("chat_template_args") or {})
        settings = {**kwargs, **self._routing, "pretrained": pretrained, "path": path}
        try:
            # This repository's own classes are used, not the copies in the checkpoint: no remote code.
            super().__init__(pretrained, trust_remote_code=False, **kwargs)
        except OSError as error:
            raise UserError(f"could not load {pretrained}: {str(error).splitlines()[0]}") from error
        except ValueError as error:
            if any(name in str(error) for name in (*ROUTING_ARGUMENTS, "model_type")):
                raise UserError(f"{pretrained}: {error}") from error
            raise
        if hasattr(self, "accelerator") and self._world_size == 1:  # hf distributes over GPUs only
            self._rank, self._world_size = self.accelerator.local_process_index, self.accelerator.num_processes
        self._num_blocks = self.config.num_hidden_layers
        self._fixed_path = None if path is None else self._parse_path(path)
        self._layer_indices = None
        if self._fixed_path is not None:
            self._layer_indices = path_to_layer_indices([int(visits) for visits in self._fixed_path])
        self._passes: list[torch.Tensor] = []  # paths [rows, L] of each forward pass since the last reset
        self.model.register_forward_hook(lambda module, inputs, output: self._passes.append(output.paths))
        self.layer_counts = LayerCounts()
        self._routing_log = routing_log
        if response_cache is not None and self._world_size > 1:
            response_cache = f"{response_cache}_rank{self._rank}"
        self.cache_hook = self._answers = _Answers(response_cache, self._identity(settings))

    # ----------------------------------------------------------------------------------------------------
    # Loading

    def _get_config(self, pretrained: str, *, revision: str = "main", subfolder: str = "", **_: Any) -> None:
        location = {"revision": revision, "subfolder": subfolder}
        fields, _unused = PretrainedConfig.get_config_dict(pretrained, **location)
        model_type = fields.get("model_type", "")
        self.is_routed = model_type.startswith(ROUTED_PREFIX)
        if self.is_routed:
            config_class, self.AUTO_MODEL_CLASS = routed_classes(model_type.removeprefix(ROUTED_PREFIX))
            self._config = config_class.from_pretrained(pretrained, **location, **self._routing)
            return
        meaningless = [name for name, value in self._routing.items() if (name, value) != ("is_static_routing", True)]
        if meaningless:
            raise UserError(
                f"{pretrained} is a plain {model_type or 'unknown'} checkpoint without routers: leave "
                f"{', '.join(meaningless)} away, or give a checkpoint of train.py"
            )
        self.AUTO_MODEL_CLASS = path_model_class(model_type)
        self._config = AutoConfig.from_pretrained(pretrained, **location)

    def _get_backend(self, *arguments: Any, **kwargs: Any) -> None:
        self.backend = "causal"

    def _create_tokenizer(self, pretrained: str, tokenizer: Any, **kwargs: Any) -> None:
        if tokenizer is None and self.is_routed:
            # With the configuration in hand transformers has no reason to ask for the checkpoint's own code.
            options = {"revision": kwargs.get("revision"), "subfolder": kwargs.get("subfolder") or ""}
            tokenizer = AutoTokenizer.from_pretrained(pretrained, config=self._config, **options)
        super()._create_tokenizer(pretrained, tokenizer, **kwargs)

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        super()._create_model(pretrained, **kwargs, **(self._routing if self.is_routed else {}))

    def _parse_path(self, path: str | int) -> str:
        if isinstance(path, int):  # lm-eval reads unquoted digits as a number, without its leading zeros
            path = str(path).zfill(self._num_blocks)
        if len(path) != self._num_blocks or not set(path) <= set("012") or not path.strip("0"):
            raise UserError(
                f"path={path} must have one digit 0 (skip), 1 (execute) or 2 (repeat) for each of the "
                f"{self._num_blocks} blocks, and run at least one"
            )
        return path

    def _identity(self, settings: dict[str, Any]) -> str:
        """A hash of everything that an answer depends on, other than the request."""
        routers = hashlib.sha256()
        if self.is_routed:
            for name, weight in sorted(self.model.model.routers.state_dict().items()):
                routers.update(name.encode() + weight.float().cpu().numpy().tobytes())
        without_effect = ("batch_size", "max_batch_size", "device")
        known = {key: str(value) for key, value in sorted(settings.items()) if key not in without_effect}
        known |= {"weights": fingerprint(self.model), "routers": routers.hexdigest(), "dtype": str(self.model.dtype)}
        known |= {name: str(getattr(self.config, name, None)) for name in (*ROUTING_ARGUMENTS, "router_input")}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuses lm-eval's own cache, whose keys don't know the model and whose answers don't know their layers."""
        raise UserError(
            "lm-eval's --use_cache would mix the answers of different checkpoints and lose the layer counts: run "
            "`python -m drllm.evaluate --use_cache FILE ...`, or pass response_cache=FILE in --model_args"
        )

    # ----------------------------------------------------------------------------------------------------
    # Requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each continuation; see `_score`."""
        return self._answer("loglikelihood", requests, disable_tqdm, super().loglikelihood)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's `hf`, with the layers of each row counted until that row has ended."""
        return self._answer("generate_until", requests, disable_tqdm, super().generate_until)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's `hf`; the prompt of a window is its one context token, so routers decide by that."""
        answers = []
        world_size, batch_size = self._world_size, self.batch_size_per_gpu
        if batch_size == "auto":  # found once, by all processes together
            self.batch_size_per_gpu = self._detect_batch_size()
        self._world_size = 1  # no windows to pad: each process answers its own requests, nothing is exchanged
        try:
            for request in requests:  # one at a time: lm-eval does not say which window belongs to which request
                found = self._answers.get("loglikelihood_rolling", request.args)
                if found is None:
                    self._answers.pending.clear()
                    self._windows: list[Measurement] = []
                    (answer,) = super().loglikelihood_rolling([request], disable_tqdm=True)
                    found = answer, self._windows
                    self._answers.put("loglikelihood_rolling", request.args, *found)
                answers.append(found[0])
                for number, measurement in enumerate(found[1]):
                    self.layer_counts.add(request.task_name, request.doc_id, ("rolling", number), measurement)
        finally:
            self._world_size, self.batch_size_per_gpu = world_size, batch_size
        self._answers.forget()
        self._share_counts(requests)
        return answers

    def _answer(self, kind: str, requests: list[Instance], disable_tqdm: bool, answer) -> list[Any]:
        """Answers what is not known yet and notes what each request took."""
        unknown = [request for request in requests if self._answers.get(kind, request.args) is None]
        if unknown or self.world_size > 1:  # every process takes part in what they do together
            self._current = unknown
            answer(unknown, disable_tqdm=disable_tqdm)
        answers = []
        for request in requests:
            found, measurement = self._answers.get(kind, request.args)
            answers.append(found)
            # squadv2 numbers its generation and its log-likelihood alike
            self.layer_counts.add(request.task_name, request.doc_id, (kind, request.idx), measurement)
        self._answers.forget()
        self._share_counts(requests)
        return answers

    def _share_counts(self, requests: list[Instance]) -> None:
        """Brings the counts of all processes to the first one, which writes the log."""
        if self.world_size > 1:
            gathered = self.gather_object(dict(self.layer_counts._requests))
            for part in gathered or ():
                for (task, doc_id), measured in part.items():
                    for index, measurement in measured.items():
                        self.layer_counts.add(task, doc_id, index, measurement)
        if self._routing_log is not None and self.rank == 0:
            path = Path(self._routing_log)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(json.dumps(query) + "\n" for query in self.layer_counts.queries()))
            partial.replace(path)

    # ----------------------------------------------------------------------------------------------------
    # Generation

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        for name in ("num_beams", "num_return_sequences"):
            if generation_kwargs.get(name, 1) != 1:
                raise UserError(f"layers are counted for one sequence a query: leave {name} away from --gen_kwargs")
        if self._layer_indices is not None:
            generation_kwargs["layer_indices"] = self._layer_indices
        self._passes.clear()
        with torch.no_grad():
            tokens = super()._model_generate(context, max_length, stop, **generation_kwargs)
        visits = torch.stack([paths.to(torch.int64).sum(1) for paths in self._passes])  # [passes, rows]
        for row, new in enumerate(tokens[:, context.shape[1] :].tolist()):
            passes = self._passes_needed(new, stop)
            measurement = Measurement(
                context=None,
                path="".join(map(str, self._passes[0][row].tolist())),
                prefill_blocks=int(visits[0, row]),
                blocks=int(visits[1:passes, row].sum()),
                passes=passes - 1,
            )
            self._answers.pending.append(measurement)
        return tokens

    def _passes_needed(self, tokens: list[int], stop: list[str]) -> int:
        """Forward passes until a row has ended by an end token or a stop string; one pass yields one token."""
        end_tokens = self.model.generation_config.eos_token_id
        end_tokens = set(end_tokens if isinstance(end_tokens, list) else [end_tokens])
        # The same look back as lm-eval's criterion: a stop string may come in another tokenisation.
        look_back = [(text, len(self.tokenizer.encode(text, add_special_tokens=False)) + 2) for text in stop]
        for number, token in enumerate(tokens, start=1):
            if token in end_tokens:
                return number
            for text, length in look_back:
                if text in self.tokenizer.decode(tokens[max(0, number - length) : number]):
                    return number
        return len(tokens)

    # ----------------------------------------------------------------------------------------------------
    # Log-likelihoods

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of tokenised (text, context, continuation) requests.

        Requests with the same context share its prefill, where the routers decide, and with it the path.
        """
        groups: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for position, (_, context, continuation) in enumerate(requests):
            kept = (context + continuation)[-(self.max_length + 1) :]  # truncated from the left, as `hf` does
            groups[tuple(kept[: -len(continuation)])][tuple(continuation)].append(position)
        contexts = sorted(groups, key=lambda context: (-len(context), context))
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        progress = tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        )
        batch_size = self._context_batch_size(contexts, groups, override_bs)
        for start in range(0, len(contexts), batch_size):
            chunk = contexts[start : start + batch_size]
            continuations = [list(groups[context]) for context in chunk]
            for context, scored in zip(chunk, self._score(chunk, continuations), strict=True):
                for continuation, (answer, measurement) in scored.items():
                    for position in groups[context][continuation]:
                        answers[position] = answer
                        text = requests[position][0]
                        if text is not None:
                            self._answers.put("loglikelihood", text, answer, measurement)
                        else:
                            self._windows.append(measurement)
                        progress.update(1)
        progress.close()
        return answers

    def _context_batch_size(self, contexts: list, groups: dict, override_bs: int | None) -> int:
        if override_bs:
            return override_bs
        if self.batch_size != "auto":
            return int(self.batch_size)
        if not contexts and self.world_size == 1:
            return 1
        # Every process takes part, also one that has nothing to score: the smallest size is agreed on.
        context, longest = (contexts[0], max(groups[contexts[0]], key=len)) if contexts else ((0,), (0,))
        self.batch_sizes = {0: self._detect_batch_size([(None, list(context), list(longest))], 0)}
        return self.batch_sizes[0]

    @torch.no_grad()
    def _score(
        self, contexts: list[tuple[int, ...]], continuations: list[list[tuple[int, ...]]]
    ) -> list[dict[tuple[int, ...], tuple[tuple[float, bool], Measurement]]]:
        """For each context: continuation -> ((log-likelihood, is greedy), what it took)."""
        # One row for each continuation that needs more than the first token's probabilities.
        rows = [
            (number, continuation)
            for number, options in enumerate(continuations)
            for continuation in options
            if len(continuation) > 1
        ]
        lengths = torch.tensor([len(context) for context in contexts])
        tokens, mask = self._padded(contexts, side="left")
        cache = PathCache(self.model.config) if rows else None
        first, paths = self._forward(tokens, mask, cache, logits_to_keep=1)
        paths = paths.tolist()
        later: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        passes: dict[tuple[int, tuple[int, ...]], int] = {}
        size = OPTIONS_PER_CONTEXT * len(contexts)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            is_last = start + size >= len(rows)
            options = cache if is_last else copy.deepcopy(cache)
            owner = torch.tensor([number for number, _ in part])
            options.batch_select_indices(owner)
            inputs, input_mask = self._padded([continuation[:-1] for _, continuation in part], side="right")
            position_ids = lengths[owner, None] + torch.arange(inputs.shape[1])
            logits, own_paths = self._forward(
                inputs, torch.cat([mask[owner], input_mask], dim=1), options, position_ids=position_ids
            )
            for row, key in enumerate(part):
                later[key] = logits[row, : len(key[1]) - 1]
                passes[key] = int(own_paths[row].sum())
        results = []
        for number, options in enumerate(continuations):
            path = "".join(map(str, paths[number]))
            context = hashlib.sha256(repr(contexts[number]).encode()).hexdigest()
            scored = {}
            for continuation in options:
                key = (number, continuation)
                logits = first[number] if key not in later else torch.cat([first[number], later[key]])
                own = passes.get(key)
                measurement = Measurement(context, path, sum(paths[number]), own or 0, int(own is not None))
                scored[continuation] = (self._log_likelihood(logits, continuation), measurement)
            results.append(scored)
        return results

    def _log_likelihood(self, logits: torch.Tensor, continuation: tuple[int, ...]) -> tuple[float, bool]:
        """(sum of log-probabilities, all tokens greedy) of a continuation under `logits` [length, vocabulary]."""
        target = torch.tensor(continuation, device=logits.device)
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        chosen = log_probabilities.gather(1, target[:, None])[:, 0]
        return float(chosen.sum()), bool((log_probabilities.argmax(-1) == target).all())

    def _forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        cache: PathCache | None,
        position_ids=None,
        logits_to_keep: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [rows, kept, vocabulary], paths [rows, L]) of a forward pass over new `tokens`."""
        if position_ids is None:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        ):
            self._passes.clear()
            output = self.model(
                input_ids=tokens.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=position_ids.to(self.device),
                past_key_values=cache,
                use_cache=cache is not None,
                layer_indices=self._layer_indices,
                logits_to_keep=logits_to_keep,
            )
        return output.logits, output.paths

    @staticmethod
    def _padded(sequences: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, mask), both [rows, longest]; padding is token 0 and masked."""
        longest = max(len(sequence) for sequence in sequences)
        tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
            tokens[row, place] = torch.tensor(sequence)
            mask[row, place] = 1
        return tokens, mask

    # ----------------------------------------------------------------------------------------------------
    # Results

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into `config` of its results: the model, how it routed, and the layers counted."""
        if os.path.isdir(self.pretrained):
            info = {
                "model_num_parameters": self.model.num_parameters(),
                "model_dtype": self.model.dtype,
                "model_revision": self.revision,
                "model_sha": "",
            }
        else:
            info = super().get_model_info()
        names = (*ROUTING_ARGUMENTS, "trained_num_windows", "router_input", "base_model_name")
        routing = {name: getattr(self.config, name) for name in names} if self.is_routed else {}
        return info | {
            "model_fingerprint": fingerprint(self.model),
            "routing": {
                "is_routed": self.is_routed,
                "num_blocks": self._num_blocks,
                "path": self._fixed_path,
                **routing,
            },
            "block_applications": self.layer_counts.summary(),
        }
