"""`drllm`, a model type for lm-eval: routed checkpoints, plain checkpoints and static paths, with layers counted.

It subclasses lm-eval's own `hf` and adds:

* Routers read the prompt only, in log-likelihood tasks too, so that all options of a question follow one path
  and no result depends on the batch size.
* The prompt of a question is computed once for all its options.
* Block applications are counted per query, and the skip / execute / repeat shares per block and task. Both are part
  of lm-eval's results JSON (`config.block_applications`) and, per query, of `routing_log`.
* Answers are cached together with their counts, under a key that includes the weights and the routing settings.

Importing this module registers the class with lm-eval; `python -m drllm.evaluate` does so and calls lm-eval's
command line.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from data_models import path_model_class
from drllm.attention import kernels_without_plans
from drllm.checkpoints import CheckpointInfo, checkpoint_info
from drllm.errors import UserError
from drllm.evaluation.layer_counts import LayerCounts, Measurement
from drllm.evaluation.options import check_options, padded
from drllm.evaluation.protocol import parse_path
from drllm.evaluation.response_cache import ResponseCache
from drllm.files import disk_errors, write_whole
from drllm.loading import LOADING_ERRORS, check_complete, check_finite, check_json_files, one_line
from drllm.provenance import fingerprint, parse_dtype, stored_parameters
from drllm.questions.grading import GRADER_VERSION
from drllm.questions.prompts import TEMPLATE_ARGUMENTS
from train_models import PathCache
from train_models.paths import path_to_layer_indices

ROUTING_ARGUMENTS = ("num_windows", "routing_control", "is_static_routing")
# Options of one question are scored together; the maximum number of rows per context of such a batch.
OPTIONS_PER_CONTEXT = 8


@register_model("drllm")
class RoutedLM(HFLM):
    """lm-eval's `hf` for models that follow paths.

    Further `--model_args`:
        pretrained: a routed checkpoint, or a plain Llama, Qwen2 or Qwen3 one (then every block runs once).
        num_windows, routing_control, is_static_routing: override those of a routed checkpoint.
        path: one static path for all queries, one digit (0, 1, 2) per block.
        routing_log: file for one JSON line per query: task, doc_id, blocks, passes, paths.
        response_cache: SQLite file of answers and counts; `drllm.evaluate --use_cache FILE` sets it.
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
        if kwargs.get("dtype", "auto") != "auto":
            parse_dtype(kwargs["dtype"])
        kwargs["chat_template_args"] = TEMPLATE_ARGUMENTS | (kwargs.get("chat_template_args") or {})
        settings = {**kwargs, **self._routing, "pretrained": pretrained, "path": path}
        try:
            # This repository's own classes are used, not the copies in the checkpoint: no remote code.
            super().__init__(pretrained, trust_remote_code=False, **kwargs)
        except LOADING_ERRORS as error:
            raise UserError(f"cannot load {pretrained}: {one_line(error)}") from error
        if hasattr(self, "accelerator") and self._world_size == 1:  # hf distributes over GPUs only
            self._rank, self._world_size = self.accelerator.local_process_index, self.accelerator.num_processes
        self._num_blocks = self.config.num_hidden_layers
        self._fixed_path = None if path is None else parse_path(path, self._num_blocks)
        self._layer_indices = None
        if self._fixed_path is not None:
            self._layer_indices = path_to_layer_indices([int(visits) for visits in self._fixed_path])
        self._passes: list[torch.Tensor] = []  # paths [rows, L] of each forward pass since the last reset
        # An adapter's wrapper does not always call the model itself, nor `generate` the wrapper.
        self._unwrapped.model.register_forward_hook(lambda module, inputs, output: self._passes.append(output.paths))
        for model in {self.model, self._unwrapped}:
            model.register_forward_hook(self._check_logits)
        self.layer_counts = LayerCounts()
        self._routing_log = routing_log
        if response_cache is not None and self._world_size > 1:
            response_cache = f"{response_cache}_rank{self._rank}"
        self.cache_hook = self._cache = ResponseCache(response_cache, self._identity(settings))

    # ----------------------------------------------------------------------------------------------------
    # Loading

    def _get_config(self, pretrained: str, *, revision: str = "main", subfolder: str = "", **_: Any) -> None:
        location = {"revision": revision, "subfolder": subfolder}
        checkpoint = checkpoint_info(pretrained, **location)
        check_json_files(Path(pretrained, subfolder))
        try:
            self._config = self._read_config(checkpoint, location)
        except LOADING_ERRORS as error:
            raise UserError(f"{pretrained}: {str(error) or type(error).__name__}") from error

    def _read_config(self, checkpoint: CheckpointInfo, location: dict[str, str]) -> PretrainedConfig:
        """The configuration; sets the model class, too."""
        self.is_routed = checkpoint.is_routed
        if self.is_routed:
            config_class, self.AUTO_MODEL_CLASS = checkpoint.routed_classes()
            return config_class.from_pretrained(checkpoint.name_or_path, **location, **self._routing)
        meaningless = [name for name, value in self._routing.items() if (name, value) != ("is_static_routing", True)]
        if meaningless:
            raise UserError(
                f"{checkpoint.name_or_path} is a plain {checkpoint.family or 'unknown'} checkpoint without routers: "
                f"omit {', '.join(meaningless)}, or pass a checkpoint of train.py"
            )
        self.AUTO_MODEL_CLASS = path_model_class(checkpoint.family)
        return AutoConfig.from_pretrained(checkpoint.name_or_path, **location)

    def _get_backend(self, *arguments: Any, **kwargs: Any) -> None:
        self.backend = "causal"

    def _create_tokenizer(self, pretrained: str, tokenizer: Any, **kwargs: Any) -> None:
        if tokenizer is None and self.is_routed:
            # Given the configuration, transformers does not look for the checkpoint's own code.
            options = {"revision": kwargs.get("revision"), "subfolder": kwargs.get("subfolder") or ""}
            tokenizer = AutoTokenizer.from_pretrained(pretrained, config=self._config, **options)
        super()._create_tokenizer(pretrained, tokenizer, **kwargs)

    def _create_model(self, pretrained: str, **kwargs: Any) -> None:
        # Adapters and other quantisers need the model itself.
        reports = not any(kwargs.get(name) for name in ("peft", "delta", "autogptq", "gptqmodel"))
        options = (self._routing if self.is_routed else {}) | ({"output_loading_info": True} if reports else {})
        super()._create_model(pretrained, **kwargs, **options)
        if reports:
            self._model, report = self._model
            check_complete(report, pretrained)
        check_finite(self._model, pretrained)

    @property
    def _unwrapped(self) -> torch.nn.Module:
        """The model without the wrapper of an adapter."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _check_logits(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Raises UserError when the first pass of a batch has non-finite logits."""
        if len(self._passes) == 1 and not torch.isfinite(output.logits[:, -1]).all():
            raise UserError(
                f"{self.pretrained}: the logits of a batch of {len(output.logits)} prompts are NaN or infinite, though "
                f"all weights are finite: its activations overflow in {self.model.dtype}, try dtype=bfloat16 or float32"
            )

    def _identity(self, settings: dict[str, Any]) -> str:
        """A hash of everything that an answer depends on, other than the request."""
        routers = hashlib.sha256()
        if self.is_routed:
            module = self._unwrapped.model.routers
            tensors = itertools.chain(stored_parameters(module), module.named_buffers())
            values = {name: tensor.detach().float().cpu().numpy().tobytes() for name, tensor in tensors}
            for name in sorted(values):
                routers.update(name.encode() + values[name])
        without_effect = ("batch_size", "max_batch_size", "device")
        facts = {key: str(value) for key, value in sorted(settings.items()) if key not in without_effect}
        facts |= {"weights": fingerprint(self.model), "routers": routers.hexdigest(), "dtype": str(self.model.dtype)}
        facts |= {name: str(getattr(self.config, name, None)) for name in (*ROUTING_ARGUMENTS, "router_input")}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuses lm-eval's own cache: its keys do not include the model, its entries no layer counts."""
        raise UserError(
            "lm-eval's --use_cache would mix the answers of different checkpoints and lose the layer counts: run "
            "`python -m drllm.evaluate --use_cache FILE ...`, or pass response_cache=FILE in --model_args"
        )

    # ----------------------------------------------------------------------------------------------------
    # Requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, is greedy) of each continuation; see `_score`."""
        return self._answer("loglikelihood", requests, disable_tqdm, super().loglikelihood)

    @kernels_without_plans()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's `hf`, with the layers of each row counted until that row has ended."""
        return self._answer("generate_until", requests, disable_tqdm, super().generate_until)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's `hf`; the prompt of a window is its one context token, which is all that the routers read."""
        answers = []
        world_size, batch_size = self._world_size, self.batch_size_per_gpu
        if batch_size == "auto":  # detected once, by all processes together
            self.batch_size_per_gpu = self._detect_batch_size()
        self._world_size = 1  # no windows to pad: each process answers its own requests, nothing is exchanged
        try:
            for request in requests:  # one by one: lm-eval does not tell which window belongs to which request
                entry = self._cache.get("loglikelihood_rolling", request.args)
                if entry is None:
                    self._cache.pending.clear()
                    self._windows: list[Measurement] = []
                    (answer,) = super().loglikelihood_rolling([request], disable_tqdm=True)
                    entry = answer, self._windows
                    self._cache.put("loglikelihood_rolling", request.args, *entry)
                answers.append(entry[0])
                for number, measurement in enumerate(entry[1]):
                    self.layer_counts.add(request.task_name, request.doc_id, ("rolling", number), measurement)
        finally:
            self._world_size, self.batch_size_per_gpu = world_size, batch_size
        self._cache.forget()
        self._share_counts(requests)
        return answers

    def _answer(self, kind: str, requests: list[Instance], disable_tqdm: bool, answer) -> list[Any]:
        """Computes the answers that are not cached and records what every request took."""
        unknown = [request for request in requests if self._cache.get(kind, request.args) is None]
        if unknown or self.world_size > 1:  # every process takes part in what they do together
            self._current = unknown
            answer(unknown, disable_tqdm=disable_tqdm)
        answers = []
        for request in requests:
            response, measurement = self._cache.get(kind, request.args)
            answers.append(response)
            # squadv2 gives its generation and its log-likelihood the same number
            self.layer_counts.add(request.task_name, request.doc_id, (kind, request.idx), measurement)
        self._cache.forget()
        self._share_counts(requests)
        return answers

    def _share_counts(self, requests: list[Instance]) -> None:
        """Gathers the counts of all processes on the first one, which writes the log."""
        if self.world_size > 1:
            for part in self.gather_object(self.layer_counts.requests()) or ():
                self.layer_counts.update(part)
        if self._routing_log is not None and self.rank == 0:
            path = Path(self._routing_log)
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(query) + "\n" for query in self.layer_counts.queries()))

    # ----------------------------------------------------------------------------------------------------
    # Generation

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        for name in ("num_beams", "num_return_sequences"):
            if generation_kwargs.get(name, 1) != 1:
                raise UserError(f"layers are counted for one sequence per query: omit {name} from --gen_kwargs")
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
            self._cache.pending.append(measurement)
        return tokens

    def _passes_needed(self, tokens: list[int], stop: list[str]) -> int:
        """Forward passes until a row has ended by an end token or a stop string; one pass yields one token."""
        end_tokens = self.model.generation_config.eos_token_id
        end_tokens = set(end_tokens if isinstance(end_tokens, list) else [end_tokens])
        # As lm-eval's stopping criterion: a stop string may be generated in another tokenisation.
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

    @kernels_without_plans()
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
        check_options(requests, self.max_length)
        for position, (_, context, continuation) in enumerate(requests):
            kept = (context + continuation)[-(self.max_length + 1) :]  # truncated from the left, as `hf` does
            groups[tuple(kept[: len(kept) - len(continuation)])][tuple(continuation)].append(position)
        contexts = sorted(groups, key=lambda context: (-len(context), context))
        answers: list[Any] = [None] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="log-likelihood requests")
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
                            self._cache.put("loglikelihood", text, answer, measurement)
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
        # All processes take part, also those with nothing to score: the smallest size is used.
        context, longest = (contexts[0], max(groups[contexts[0]], key=len)) if contexts else ((0,), (0,))
        self.batch_sizes = {0: self._detect_batch_size([(None, list(context), list(longest))], 0)}
        return self.batch_sizes[0]

    @torch.no_grad()
    def _score(
        self, contexts: list[tuple[int, ...]], continuations: list[list[tuple[int, ...]]]
    ) -> list[dict[tuple[int, ...], tuple[tuple[float, bool], Measurement]]]:
        """Per context: continuation -> ((log-likelihood, is greedy), what it took)."""
        # One row per continuation that needs more than the first token's probabilities.
        rows = [
            (number, continuation)
            for number, options in enumerate(continuations)
            for continuation in options
            if len(continuation) > 1
        ]
        lengths = torch.tensor([len(context) for context in contexts])
        tokens, mask = padded(contexts, side="left")
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
            inputs, input_mask = padded([continuation[:-1] for _, continuation in part], side="right")
            position_ids = lengths[owner, None] + torch.arange(inputs.shape[1])
            logits, own_paths = self._forward(
                inputs, torch.cat([mask[owner], input_mask], dim=1), options, position_ids=position_ids
            )
            for row, (key, blocks) in enumerate(zip(part, own_paths.sum(1).tolist(), strict=True)):
                later[key], passes[key] = logits[row, : len(key[1]) - 1], blocks
        keys = [(number, continuation) for number, options in enumerate(continuations) for continuation in options]
        answers = [self._log_likelihood(torch.cat([first[n], later.get((n, c), first[n][:0])]), c) for n, c in keys]
        # The host waits for the device here, and not for each option.
        sums, greedy = (torch.stack(part).tolist() for part in zip(*answers, strict=True))
        results: list[dict] = [{} for _ in contexts]
        digests = [hashlib.sha256(repr(context).encode()).hexdigest() for context in contexts]
        for (number, continuation), *answer in zip(keys, sums, greedy, strict=True):
            path, own = paths[number], passes.get((number, continuation))
            text = "".join(map(str, path))
            measurement = Measurement(digests[number], text, sum(path), own or 0, int(own is not None))
            results[number][continuation] = (tuple(answer), measurement)
        return results

    def _log_likelihood(self, logits: torch.Tensor, continuation: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """(sum of log-probabilities, all tokens greedy), both [], of a continuation; `logits` [length, vocabulary]."""
        target = torch.tensor(continuation, device=logits.device)
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
        chosen = log_probabilities.gather(1, target[:, None])[:, 0]
        return chosen.sum(), (log_probabilities.argmax(-1) == target).all()

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

    # ----------------------------------------------------------------------------------------------------
    # Results

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes to `config` of its results: the model, its routing settings and the layers counted."""
        if Path(self.pretrained).is_dir():
            info = {
                "model_num_parameters": self.model.num_parameters(),
                "model_dtype": self.model.dtype,
                "model_revision": self.revision,
                "model_sha": "",
            }
        else:
            info = super().get_model_info()
        routing = {"is_routed": self.is_routed, "num_blocks": self._num_blocks, "path": self._fixed_path}
        if self.is_routed:
            names = (*ROUTING_ARGUMENTS, "trained_num_windows", "router_input", "base_model_name")
            routing |= {name: getattr(self.config, name) for name in names}
        return info | {
            "model_fingerprint": fingerprint(self.model),
            "grader_version": GRADER_VERSION,
            "routing": routing,
            "block_applications": self.layer_counts.summary(),
        }
