"""What turns a stock decoder into a routed one: configuration fields, one RouterBlock per block, decisions at prefill.

A family needs three short classes, see `modeling_llama.py`. Nothing here knows the family.
"""

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from .cache import RowSchedule
from .following import CausalLMOverPaths, FollowsPaths, PathCausalLMOutput, PathModelOutput
from .generating import GeneratesAlongDecisions
from .paths import EXECUTE
from .routing import PromptWindows, RouterBlock, check_control, prompt_windows, route

logger = logging.getLogger(__name__)

ROUTER_INPUTS = ("previous_layer", "embeddings")

# How the name of a model begins that no folder holds yet: who records it (PEFT) must not find the plain base there.
UNSAVED = "unsaved routed model on "


@dataclass(kw_only=True)
class RoutedConfigFields:
    """Mixin for a stock configuration.

    Attributes:
        num_windows: windows per prompt, W.
        trained_num_windows: W at training, None before; a difference triggers a warning when a model is built.
        is_static_routing: execute every block once, regardless of the routers; the logits equal the base model's.
        routing_control: the knob p of Appendix B; -0.5 is the pure router.
        router_width, router_depth: shape of the routers; depth counts linear layers.
        router_input: "previous_layer" (published) or "embeddings" (Table 6).
        base_model_name, base_model_revision, base_model_fingerprint: what was retrofitted.
    """

    num_windows: int = 8
    trained_num_windows: int | None = None
    is_static_routing: bool = False
    routing_control: float = -0.5
    router_width: int = 128
    router_depth: int = 2
    router_input: str = "previous_layer"
    base_model_name: str | None = None
    base_model_revision: str | None = None
    base_model_fingerprint: str | None = None

    # What `Trainer` omits from predictions, which leaves the logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "cache",  # the name of the cache since transformers 5.24
        "paths",
        "router_logits",
        "router_inputs",
        "window_mask",
    ]

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_routing()

    def check_routing(self) -> None:
        """Raises ValueError, with the field, for values that no router can work with."""
        check_control(self.routing_control)
        for field in ("num_windows", "router_width", "router_depth"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if getattr(self, "router_domain", 0):
            raise ValueError("the routers have domains, which only their own code knows; pass trust_remote_code=True")
        if self.router_input not in ROUTER_INPUTS:
            raise ValueError(f"router_input is {self.router_input!r}; it must be one of {', '.join(ROUTER_INPUTS)}")


@dataclass
class RoutedModelOutput(PathModelOutput):
    """`PathModelOutput` and, on request, the inputs and outputs of the routers.

    router_logits: float32 [batch, L, 3]; router_inputs: window means [batch, L, W, d]; window_mask: bool [batch, W].
    """

    router_logits: torch.Tensor | None = None
    router_inputs: torch.Tensor | None = None
    window_mask: torch.Tensor | None = None


@dataclass
class RoutedCausalLMOutput(PathCausalLMOutput):
    """See `RoutedModelOutput`."""

    router_logits: torch.Tensor | None = None
    router_inputs: torch.Tensor | None = None
    window_mask: torch.Tensor | None = None


def prompt_mask_of(
    attention_mask: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    prompt_length: torch.Tensor | None,
    batch_size: int,
    num_tokens: int,
    device: torch.device,
) -> torch.Tensor:
    """bool [batch, T]: the tokens that the routers may read.

    `prompt_mask` as it is; else the real tokens by `attention_mask` (all tokens without one), of these the first
    `prompt_length` per row. Padding is never guessed from token ids. Raises ValueError for shapes that don't fit.
    """
    if prompt_mask is None:
        if attention_mask is None:
            prompt_mask = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
        elif isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            prompt_mask = attention_mask.to(device).bool()
        else:
            raise ValueError("with a prepared attention mask the routers need prompt_mask, bool [batch, tokens]")
    prompt_mask = prompt_mask.to(device).bool()
    if tuple(prompt_mask.shape) != (batch_size, num_tokens):
        raise ValueError(
            f"the prompt mask has the shape {tuple(prompt_mask.shape)}, but the prompt {(batch_size, num_tokens)}; the "
            "routers decide in the first forward pass, so it needs the whole prompt and not a chunk of it"
        )
    if prompt_length is None:
        return prompt_mask
    prompt_length = torch.as_tensor(prompt_length, device=device)
    if tuple(prompt_length.shape) != (batch_size,):
        raise ValueError(f"prompt_length needs one length per row, {batch_size} in all, not {prompt_length.tolist()}")
    return prompt_mask & (prompt_mask.cumsum(1) <= prompt_length[:, None])


def prompt_of_labels(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(bool [batch, T], bool []): the prompt of each row by its `labels` [batch, T], and whether a row does not say.

    The prompt is made of the real tokens before the first label that is not -100. A row that begins with a label says
    nothing about its prompt, so all of its real tokens are taken.
    """
    is_real = torch.ones_like(labels, dtype=torch.bool)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_real = attention_mask.to(labels.device).bool()
    is_prompt = is_real & ((labels != -100).cumsum(1) == 0)
    is_marked = is_prompt.any(1)
    return torch.where(is_marked[:, None], is_prompt, is_real), ~is_marked.all()


def _check_unpacked(position_ids: torch.Tensor | None, kwargs: dict) -> None:
    """Raises ValueError for rows of several sequences, as `DataCollatorWithFlattening` makes them."""
    is_packed = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("seq_idx") is not None
    if position_ids is not None and not is_packed:
        is_packed = bool((position_ids[..., 1:] <= position_ids[..., :-1]).any())
    if is_packed:
        raise ValueError(
            "the batch packs several sequences into one row, but a router decides once per row; pass one row per "
            "sequence with an attention_mask"
        )


class _Routers:
    """Evaluates the routers during one prefill: decides where no path is known, and records what is requested."""

    def __init__(
        self,
        model: "RoutedModel",
        windows: PromptWindows,
        embeddings,
        decides: bool,
        record_logits: bool,
        record_inputs: bool,
    ):
        self._model = model
        self._windows = windows
        self._decides = decides
        self._has_no_prompt = ~windows.valid.any(1)
        self._logits: list[torch.Tensor] | None = [] if record_logits else None
        self._inputs: list[torch.Tensor] | None = [] if record_inputs else None
        self._needs_logits = record_logits or decides
        self._pooled_embeddings = windows.pool(embeddings) if model.config.router_input == "embeddings" else None
        self._actions: list[list[int]] | None = None  # [block][row], where all are known before the first block
        if decides and self._pooled_embeddings is not None:
            pooled = self._pooled_embeddings
            actions = [self._actions_for(self._evaluate(block, pooled)) for block in range(len(model.routers))]
            self._actions = torch.stack([part.to(actions[0].device) for part in actions]).tolist()

    def before_block(self, block: int, hidden_states: torch.Tensor, schedule: RowSchedule) -> None:
        """Appends the actions at `block`, given its input [batch, T, d], unless the path is known."""
        pooled = self._windows.pool(hidden_states) if self._pooled_embeddings is None else self._pooled_embeddings
        if self._inputs is not None:
            self._inputs.append(pooled)
        if self._actions is not None:
            schedule.append(self._actions[block])
        elif self._needs_logits:
            logits = self._evaluate(block, pooled)
            if self._decides:
                # The host waits here, once per block: it has to know what to run next.
                schedule.append(self._actions_for(logits).tolist())

    def _evaluate(self, block: int, pooled: torch.Tensor) -> torch.Tensor:
        logits = self._model.routers[block](pooled, self._windows.valid)
        if self._logits is not None:
            self._logits.append(logits)
        return logits

    def _actions_for(self, logits: torch.Tensor) -> torch.Tensor:
        actions = route(logits, self._model.routing_control)
        # Without a prompt there are no votes, and nothing speaks against the base model.
        return actions.masked_fill(self._has_no_prompt.to(actions.device), EXECUTE)

    def outputs(self) -> dict[str, torch.Tensor | None]:
        """The recorded fields of `RoutedModelOutput`."""

        def stacked(parts):
            return None if parts is None else torch.stack([part.to(parts[0].device) for part in parts], dim=1)

        inputs = stacked(self._inputs)
        return {
            "router_logits": stacked(self._logits),
            "router_inputs": inputs,
            "window_mask": None if inputs is None else self._windows.valid,
        }


class RoutedModel(FollowsPaths):
    """Mixin for a stock base model: one RouterBlock per block decides, once per sequence, at prefill.

    `forward` takes these arguments on top of those of `FollowsPaths.forward`:
        prompt_mask: bool [batch, T], the tokens that routers may read at prefill; default: the attention mask.
        prompt_length: [batch], only the first so many real tokens of a row are prompt (for log-likelihoods, where
            context and continuation come together).
        output_router_logits, output_router_inputs: fill these fields of the output. With `layer_indices` given the
            execution follows those paths and the routers decide nothing: teacher forcing.
    """

    def __init__(self, config):
        config.check_routing()  # again: from_pretrained sets fields on a configuration that is already made
        super().__init__(config)
        self.routers = nn.ModuleList(
            RouterBlock(config.hidden_size, config.router_width, config.router_depth)
            for _ in range(config.num_hidden_layers)
        )
        self._has_noted_prompt = False
        self._no_split_modules = {*(self._no_split_modules or ()), RouterBlock.__name__}
        if config.trained_num_windows not in (None, config.num_windows):
            logger.warning(
                "the routers were trained with num_windows=%d but will read %d windows; pass num_windows=%d to route "
                "as trained",
                config.trained_num_windows,
                config.num_windows,
                config.trained_num_windows,
            )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RouterBlock):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def init_routers(self, seed: int | None = None) -> None:
        """Initialises every router again (Xavier-uniform weights, zero biases); a seed makes it repeatable."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for router in self.routers:
            weight = router.layers[0].weight
            if weight.is_meta:
                raise ValueError('the routers are offloaded; give "model.routers" a device in device_map')
            # Drawn on the CPU: routers may lie on several devices, and a seed means the same on all of them.
            with torch.device("meta"):
                config = self.config
                drawn = RouterBlock(config.hidden_size, config.router_width, config.router_depth)
            drawn.to_empty(device="cpu").to(weight.dtype).reset_parameters(generator)
            router.load_state_dict(drawn.state_dict())

    @property
    def num_windows(self) -> int:
        """Windows per prompt; stored in the configuration."""
        return self.config.num_windows

    @num_windows.setter
    def num_windows(self, value: int) -> None:
        if value < 1:
            raise ValueError(f"num_windows is {value}; it must be at least 1")
        self.config.num_windows = value

    @property
    def is_static_routing(self) -> bool:
        """Whether every block is executed once, as in the base model; stored in the configuration."""
        return self.config.is_static_routing

    @is_static_routing.setter
    def is_static_routing(self, value: bool) -> None:
        self.config.is_static_routing = value

    @property
    def routing_control(self) -> float:
        """The knob p in [-1, 1], see `routing.action_probabilities`; stored in the configuration."""
        return self.config.routing_control

    @routing_control.setter
    def routing_control(self, value: float) -> None:
        check_control(value)
        self.config.routing_control = value

    def _default_schedule(self, batch_size: int, device: torch.device) -> RowSchedule | None:
        return super()._default_schedule(batch_size, device) if self.is_static_routing else None

    def _decider(self, known, is_decoding, inputs_embeds, attention_mask, position_ids, kwargs) -> _Routers | None:
        prompt = {name: kwargs.pop(name, None) for name in ("prompt_mask", "prompt_length")}
        record_logits = kwargs.pop("output_router_logits", False)
        record_inputs = kwargs.pop("output_router_inputs", False)
        is_unpacked = kwargs.pop("is_unpacked", False)
        labelled_prompt_mask = kwargs.pop("labelled_prompt_mask", None)
        may_hold_answer = kwargs.pop("may_hold_answer", False)
        if is_decoding or (known is not None and not record_logits and not record_inputs):
            return None
        if known is None and torch.compiler.is_exporting():
            raise ValueError(
                "torch.export cannot follow a decision, which depends on the prompt; pass layer_indices, or set "
                "is_static_routing"
            )
        if known is None and inputs_embeds.is_meta:
            raise ValueError(
                "a decision depends on the values of the prompt, which the device 'meta' does not hold; pass "
                "layer_indices, or set is_static_routing"
            )
        is_said = labelled_prompt_mask is not None or any(value is not None for value in prompt.values())
        if not is_said and self.training and torch.is_grad_enabled():
            may_hold_answer = True  # trainers that compute the logits themselves pass no labels
        if known is None and not self._has_noted_prompt and may_hold_answer:
            self._has_noted_prompt = True
            logger.warning(
                "the routers read every token of this batch, the answers included, where nothing says which are the "
                "prompt; pass prompt_length or prompt_mask, or labels of -100 on the prompt"
            )
        batch_size, num_tokens = inputs_embeds.shape[:2]
        says_what_rows_are = is_unpacked or attention_mask is not None or prompt["prompt_mask"] is not None
        _check_unpacked(None if says_what_rows_are else position_ids, kwargs)
        if labelled_prompt_mask is not None:
            prompt["prompt_mask"] = labelled_prompt_mask
        prompt_mask = prompt_mask_of(
            attention_mask,
            **prompt,
            batch_size=batch_size,
            num_tokens=num_tokens,
            device=inputs_embeds.device,
        )
        windows = prompt_windows(prompt_mask, self.num_windows, inputs_embeds.dtype)
        return _Routers(self, windows, inputs_embeds, known is None, record_logits, record_inputs)

    def _output(self, decider, **fields) -> RoutedModelOutput:
        return RoutedModelOutput(**fields, **(decider.outputs() if decider is not None else {}))


class RoutedCausalLM(GeneratesAlongDecisions, CausalLMOverPaths):
    """Mixin for a stock model with a language-model head over a `RoutedModel`; `forward` takes its arguments."""

    output_type = RoutedCausalLMOutput

    def __init_subclass__(cls, **kwargs):
        """Registers a family with transformers, as its own models are."""
        super().__init_subclass__(**kwargs)
        # Code that goes by class name: Trainer's label smoothing shifts labels for these, pipelines accept them.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(cls.config_class.model_type, cls.__name__)
        MODEL_MAPPING_NAMES.setdefault(cls.config_class.model_type, cls.base_model_type.__name__)
        if cls.__module__.startswith("transformers_modules."):
            return  # the code of a checkpoint: another checkpoint may bring other code of the same family
        AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
        AutoModel.register(cls.config_class, cls.base_model_type, exist_ok=True)
        AutoModelForCausalLM.register(cls.config_class, cls, exist_ok=True)

    def __init__(self, config):
        super().__init__(config)
        self._has_noted_training = False
        if getattr(config, "quantization_config", None) is not None:
            # The list of modules to skip that every quantiser of transformers reads.
            self._keep_in_fp32_modules = {*self._keep_in_fp32_modules, "model.routers"}

    def _init_weights(self, module: nn.Module) -> None:
        RoutedModel._init_weights(self, module) if isinstance(module, RouterBlock) else super()._init_weights(module)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in the stock model; `AutoModel` finds the base model in the checkpoint, too."""
        if self._auto_class is not None:
            module = type(self).__module__.rpartition(".")[2]
            auto_map = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = auto_map | {"AutoModel": f"{module}.{self.base_model_type.__name__}"}
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.name_or_path.startswith(UNSAVED):
            self.name_or_path = str(save_directory)

    def _prompt_of(self, attention_mask, labels, logits_to_keep, kwargs: dict) -> dict:
        """Trainers pass prompt and answer in one go, with labels of -100 on the prompt: it is what the routers read."""
        if kwargs.get("prompt_mask") is not None or kwargs.get("prompt_length") is not None:
            return {}
        if labels is None:
            asks_for_several = isinstance(logits_to_keep, torch.Tensor) or logits_to_keep > 1
            return {"may_hold_answer": True} if asks_for_several else {}
        prompt, may_hold_answer = prompt_of_labels(labels, attention_mask)
        return {"labelled_prompt_mask": prompt, "may_hold_answer": may_hold_answer}

    def _note_training(self, output_router_logits: bool = False, **_kwargs) -> None:
        is_relevant = self.training and torch.is_grad_enabled() and not output_router_logits
        if self._has_noted_training or not is_relevant or torch.compiler.is_compiling():
            return
        if any(parameter.requires_grad for parameter in self.model.routers.parameters()):
            self._has_noted_training = True
            logger.warning(
                "the loss on labels trains no router, because a decision passes no gradient on; train routers on the "
                "paths of the search with train.py, or with model(..., layer_indices=paths, output_router_logits=True) "
                "and a loss on router_logits"
            )
