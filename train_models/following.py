"""Decoder models whose forward pass follows one path per row of the batch.

`FollowsPaths` goes before a stock base model (`class LlamaModel(FollowsPaths, transformers.LlamaModel)`) and replaces
only the loop over its blocks; `CausalLMOverPaths` does the same for the model with the language-model head. Blocks,
attention, rotary embeddings and masks stay those of transformers.
"""

import threading
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache import CACHE_NAME, PathCache, RowSchedule, applications, one_cache
from .generating import GeneratesAlongPaths, LayerIndices, has_a_path_per_row
from .graphs import DecodingGraphs
from .paths import default_path, layer_indices_to_path
from .self_check import ChecksItself
from .sharding import in_step, is_sharded, visits_elsewhere

MASK_FACTORIES = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


@dataclass
class PathModelOutput(BaseModelOutputWithPast):
    """The stock output and `paths`, int8 [batch, L]: how often each block ran in each row."""

    paths: torch.Tensor | None = None


@dataclass
class PathCausalLMOutput(CausalLMOutputWithPast):
    """The stock output and `paths`, int8 [batch, L]: how often each block ran in each row."""

    paths: torch.Tensor | None = None


def _states_wanted(selection: bool | list[int], count: int) -> set[int]:
    """Which of `count` hidden states `output_hidden_states` selects: all, none, or those at its indices."""
    if isinstance(selection, bool) or selection is None:
        return set(range(count)) if selection else set()
    if wrong := [index for index in selection if not -count <= index < count]:
        raise ValueError(f"output_hidden_states names state {wrong[0]}, but there are states 0 to {count - 1}")
    return {index % count for index in selection}


def check_attention(implementation: str, device: torch.device) -> None:
    """Raises ValueError, with what to use, where an attention back end (`attn_implementation`) does not run."""
    if implementation == "flex_attention" and device.type == "cpu":
        raise ValueError(
            "attn_implementation is 'flex_attention', whose kernels torch cannot compile on a CPU for most masks, the "
            "stock model's included; use 'sdpa' there"
        )


def _refuse_cache_under_checkpointing(cache: PathCache | None) -> bool:
    """`use_cache` there: False. Raises ValueError where the caller counts on a cache, as `generate` does."""
    if cache is not None:
        raise ValueError(
            "gradient checkpointing drops the cache in train mode, so that each step would decide anew; call "
            "model.eval() or model.gradient_checkpointing_disable() first, or pass use_cache=False"
        )
    return False


def _block_mask_of_rows(mask: BlockMask, rows: torch.Tensor) -> BlockMask:
    """Flex attention's mask for `rows` of the batch; indexing alone would leave it without its function."""
    mask_mod = mask.mask_mod

    def mask_of_rows(row, head, query, key):
        return mask_mod(rows[row], head, query, key)

    mask = mask[rows]
    mask.mask_mod = mask_of_rows
    return mask


class _RowViews:
    """Masks, positions and rotary embeddings for subsets of the batch, each subset made once per forward pass."""

    def __init__(self, masks: dict, position_ids: torch.Tensor, position_embeddings: tuple, batch_size: int):
        self._full_batch = (masks, position_ids, position_embeddings)
        self._batch_size = batch_size
        self._views: dict[tuple[int, str], dict] = {}

    def of(self, row_set: int, rows: torch.Tensor | None, kind: str) -> dict:
        """The keyword arguments that a block of attention `kind` takes for `rows` (None: all of them), the indices of
        the set of that number in the schedule."""
        key = (row_set, kind)
        if key not in self._views:
            masks, position_ids, position_embeddings = self._full_batch
            self._views[key] = {
                "attention_mask": self._select(masks[kind], rows),
                "position_ids": self._select(position_ids, rows),
                "position_embeddings": tuple(self._select(part, rows) for part in position_embeddings),
            }
        return self._views[key]

    def _select(self, value, rows: torch.Tensor | None):
        if value is None or rows is None:
            return value
        if isinstance(value, BlockMask):
            return _block_mask_of_rows(value, rows)
        if value.shape[0] != self._batch_size or self._batch_size == 1:
            return value  # broadcast over the batch
        return value.index_select(0, rows)


class _LastCall:
    """The last forward pass of each thread: (schedule, forward passes since the prefill). Copies start empty."""

    def __init__(self):
        self._of_thread = threading.local()
        self._of_any_thread: tuple[RowSchedule, int] | None = None

    def note(self, schedule: RowSchedule, forward_passes: int) -> None:
        self._of_thread.call = self._of_any_thread = schedule, forward_passes

    def get(self) -> tuple[RowSchedule, int] | None:
        """That of the calling thread; for one that ran none (it waits for a worker, say) the last of all threads."""
        return getattr(self._of_thread, "call", self._of_any_thread)

    def __reduce__(self):
        return _LastCall, ()


class FollowsPaths(ChecksItself):
    """Mixin for a stock base model (LlamaModel, Qwen2Model, ...): the forward pass follows one path per row.

    Each application of a block has its own keys and values (`PathCache`). Block l runs once over the rows with
    y_l >= 1, then once more over those with y_l = 2. With every block executed once the logits equal the stock model's.
    """

    def __init__(self, config):
        super().__init__(config)
        self._last_call = _LastCall()
        self.graphs: DecodingGraphs | None = None  # see `decode_with_graphs`
        self._layer_indices: LayerIndices | None = None

    @property
    def layer_indices(self) -> LayerIndices | None:
        """The path of the next prompts, one for all rows or one per row, where none is given as an argument.

        None, the default, leaves it to the model: every block once, or what routers decide. It belongs to this object
        and is not saved. A cache that holds tokens keeps the path it was filled along. Setting raises ValueError for
        what is not a path.
        """
        return self._layer_indices

    @layer_indices.setter
    def layer_indices(self, value: LayerIndices | None) -> None:
        if value is not None:
            self._paths_of(value, len(value) if has_a_path_per_row(value) else 1)
        self._layer_indices = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: PathCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        layer_indices: LayerIndices | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: PathCache | None = None,
        advances_cache: bool = True,
        **kwargs,
    ) -> PathModelOutput | tuple:
        """The stock forward pass along paths.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, use_cache, output_hidden_states, return_dict: as in
                the stock model; input_ids [batch, T]. A list of output_hidden_states selects states, the others are
                None.
            past_key_values, cache: two names of one argument, the second since transformers 5.24: a `PathCache`, or an
                empty `DynamicCache`, which becomes one. Once it holds tokens, its paths are followed.
            layer_indices: a non-decreasing list of block indices for the whole batch ([0, 1, 1, 3]), or one such list
                per row. None: the cache's paths, else the attribute of that name, else what routers decide, if any.
            advances_cache: False where the caller counts the pass itself, outside of compiled code (`note_pass`).

        Raises:
            ValueError: for `layer_indices` that are not a path or contradict the cache, for kinds of caches without
                room for a second visit, for attention back ends that do not run, for `output_attentions`, and for a
                cache under gradient checkpointing in train mode.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions is not offered: a repeated block attends twice and a skipped one not at all; "
                "use the stock model to look at attention"
            )
        cache = one_cache(past_key_values, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        check_attention(self.config._attn_implementation, inputs_embeds.device)
        if torch.compiler.is_exporting():
            if cache is not None or use_cache:
                raise ValueError(
                    "torch.export of a forward pass with a cache is not supported, because its paths are not tensors; "
                    "pass use_cache=False"
                )
            use_cache = False
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (
            self.gradient_checkpointing
            and self.training
            and not (CACHE_NAME == "cache" and not torch.is_grad_enabled())
        ):
            use_cache = _refuse_cache_under_checkpointing(cache)
        cache = PathCache.of(cache, self.config) if use_cache or cache is not None else None
        batch_size, num_tokens = inputs_embeds.shape[:2]
        schedule, decider = self._schedule(layer_indices, cache, inputs_embeds, attention_mask, position_ids, kwargs)
        if position_ids is None:
            tokens_seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(num_tokens, device=inputs_embeds.device) + tokens_seen).unsqueeze(0)

        kinds, blocks, hidden_states, views = self._attention_kinds, self.layers, inputs_embeds, None
        if self.graphs is not None and self.graphs.serves(num_tokens, cache):
            hidden_states = self.graphs.step(inputs_embeds, attention_mask, position_ids, cache, output_hidden_states)
            blocks = ()
        else:
            masks = self._masks(set(kinds), inputs_embeds, attention_mask, cache, position_ids)
            views = _RowViews(masks, position_ids, self.rotary_emb(inputs_embeds, position_ids), batch_size)

        # What is not wanted is not kept either: the states of a long prompt are as large as its cache.
        wanted = _states_wanted(output_hidden_states, len(self.layers) + 1)
        all_hidden_states = [hidden_states if 0 in wanted else None]
        is_in_step = is_sharded(self.layers)
        for block, layer in enumerate(blocks):
            is_compiled = layer._compiled_call_impl is not None
            run = layer._call_impl if is_compiled and num_tokens > 1 else layer  # see `compile_blocks`
            if decider is not None:
                decider.before_block(block, hidden_states, schedule)
            elsewhere = visits_elsewhere(len(schedule[block]), hidden_states.device) if is_in_step else 0
            for visit, row_set in enumerate(schedule[block]):
                rows = schedule.row_indices(row_set)
                output = run(
                    hidden_states if rows is None else hidden_states.index_select(0, rows.to(hidden_states.device)),
                    use_cache=use_cache,
                    **{CACHE_NAME: cache.slot(block, visit) if cache is not None else None},
                    **views.of(row_set, rows, kinds[block]),
                    **kwargs,
                )
                # Never in place: the caller may hold `inputs_embeds`, and gradients may need the old rows.
                hidden_states = (
                    output
                    if rows is None
                    else hidden_states.to(output.device).index_copy(0, rows.to(output.device), output)
                )
            for _ in range(elsewhere):
                row_set, rows = schedule.first_row()
                first_row = views.of(row_set, rows, kinds[block])
                output = run(hidden_states[:1], use_cache=False, **{CACHE_NAME: None}, **first_row, **kwargs)
                hidden_states = in_step(hidden_states, output)
            # The last state is the normed one.
            all_hidden_states.append(hidden_states if block + 1 in wanted and block + 1 < len(blocks) else None)
        hidden_states = self.norm(hidden_states)
        all_hidden_states[-1] = hidden_states if len(self.layers) in wanted else None

        if advances_cache:
            self.note_pass(schedule, cache, num_tokens)
        paths = schedule.paths_tensor()
        output = self._output(
            decider,
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            paths=paths.expand(batch_size, -1) if torch.compiler.is_exporting() else paths,
            **{CACHE_NAME: cache if use_cache else None},
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @torch.compiler.disable  # or the counts would be inputs of the compiled graph, which must not change
    def note_pass(self, schedule: RowSchedule, cache: PathCache | None, num_tokens: int) -> None:
        """Counts a forward pass over `num_tokens` tokens per row, in the cache and for `block_applications`."""
        if cache is not None:
            cache.advance(schedule, num_tokens)
        # Not the cache itself: its keys and values must be free to go when the caller drops them.
        self._last_call.note(schedule, cache.forward_passes if cache is not None else 1)

    @property
    def block_applications(self) -> torch.Tensor:
        """int64 [batch]: block applications of each row since the last prefill, summed over its forward passes.

        They are those of the calling thread; a thread that ran no forward pass gets those of the last one of any. A
        cache holds its own, `PathCache.block_applications`. Without a cache each forward pass is a prefill of its own.
        Raises RuntimeError before the first forward pass.
        """
        return applications(*(self._last_call.get() or (None, 0)))

    def _schedule(self, layer_indices, cache, inputs_embeds, attention_mask, position_ids, kwargs: dict):
        """(schedule, decider): known paths and, where decisions or router inputs are wanted, who makes them."""
        decided = cache.schedule if cache is not None else None
        batch_size = inputs_embeds.shape[0]
        if layer_indices is None and decided is None:
            layer_indices = self.layer_indices
        if torch.compiler.is_exporting() and not (layer_indices is not None and has_a_path_per_row(layer_indices)):
            batch_size = 1  # one path for all rows, whose number may be symbolic
        if decided is not None and decided.batch_size != batch_size:
            raise ValueError(
                f"the batch has {batch_size} rows, but past_key_values holds {decided.batch_size}; keep them together "
                "with past_key_values.batch_select_indices(rows)"
            )
        if layer_indices is not None:
            paths = self._paths_of(layer_indices, batch_size)
            if decided is not None and decided.paths() != paths:
                raise ValueError("layer_indices differ from the paths that past_key_values was filled along")
            known = decided or RowSchedule.of(paths, len(self.layers), inputs_embeds.device)
        else:
            known = decided or self._default_schedule(batch_size, inputs_embeds.device)
        decider = self._decider(known, decided is not None, inputs_embeds, attention_mask, position_ids, kwargs)
        return known or RowSchedule(batch_size, inputs_embeds.device), decider

    def _default_schedule(self, batch_size: int, device: torch.device) -> RowSchedule | None:
        """What to follow when neither the caller nor the cache says; None leaves it to the decider."""
        num_blocks = len(self.layers)
        return RowSchedule.of([default_path(num_blocks)] * batch_size, num_blocks, device)

    def _decider(
        self, known: RowSchedule | None, is_decoding: bool, inputs_embeds, attention_mask, position_ids, kwargs: dict
    ):
        """The object called before each block: extends the schedule when no path is known, and may record; or None."""
        return None

    def _output(self, decider, **fields) -> PathModelOutput:
        return PathModelOutput(**fields)

    def _paths_of(self, layer_indices: LayerIndices, batch_size: int) -> list:
        num_blocks = len(self.layers)
        as_list = layer_indices.tolist() if isinstance(layer_indices, torch.Tensor) else layer_indices
        if not has_a_path_per_row(as_list):
            return [layer_indices_to_path([int(index) for index in as_list], num_blocks)] * batch_size
        if len(as_list) != batch_size:
            raise ValueError(
                f"layer_indices gives paths for {len(as_list)} rows, but the batch has {batch_size}; pass one list for "
                "the batch or one per row"
            )
        return [layer_indices_to_path([int(index) for index in row], num_blocks) for row in as_list]

    @cached_property
    def _attention_kinds(self) -> list[str]:
        """The kind of mask that each block takes: "full_attention" or "sliding_attention"; its attention keeps it."""
        if getattr(self.config, "layer_types", None) is not None:
            return list(self.config.layer_types)
        is_sliding = getattr(self.config, "sliding_window", None) is not None
        return ["sliding_attention" if is_sliding else "full_attention"] * len(self.layers)

    def _masks(self, kinds: set[str], inputs_embeds, attention_mask, cache, position_ids) -> dict:
        if isinstance(attention_mask, dict):  # prepared by the caller, one mask per kind
            return attention_mask
        return {
            kind: MASK_FACTORIES[kind](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
            )
            for kind in kinds
        }


class CausalLMOverPaths(ChecksItself, GeneratesAlongPaths):
    """Mixin for a stock model with a language-model head whose base model is a `FollowsPaths`.

    Subclasses set `base_model_type`, the class of `self.model`.
    """

    base_model_type: type
    output_type = PathCausalLMOutput

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "base_model_type"):
            cls.base_model_type.causal_lm_type = cls

    def __init__(self, config):
        # Not the stock class's __init__, which would build the stock base model first.
        PreTrainedModel.__init__(self, config)
        self.model = self.base_model_type(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: PathCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        layer_indices: LayerIndices | None = None,
        return_dict: bool | None = None,
        cache: PathCache | None = None,
        **kwargs,
    ):
        """The stock forward pass along paths; see `FollowsPaths.forward` for `layer_indices` and the cache."""
        if return_dict is None:
            return_dict = self.config.return_dict
        kwargs |= self._prompt_of(attention_mask, labels, logits_to_keep, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            layer_indices=layer_indices,
            return_dict=True,
            **{CACHE_NAME: one_cache(past_key_values, cache)},
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Of a strided view torch makes one product per row, and each of them reads (in bfloat16 copies) the whole head.
        logits = self.lm_head(hidden_states[:, kept, :].contiguous())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            self._note_training(**kwargs)
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        output = self.output_type(loss=loss, logits=logits, **fields)
        return output if return_dict else output.to_tuple()

    def _prompt_of(self, attention_mask, labels, logits_to_keep, kwargs: dict) -> dict:
        """Arguments that tell the base model which tokens are the prompt, where `kwargs` do not."""
        return {}

    def _note_training(self, **_kwargs) -> None:
        """Called with the keyword arguments of a forward pass that computes the loss on labels."""

    @property
    def block_applications(self) -> torch.Tensor:
        """See `FollowsPaths.block_applications`."""
        return self.model.block_applications
