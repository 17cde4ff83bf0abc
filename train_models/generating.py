"""What `generate` of transformers asks of a model, for models that follow paths.

`GeneratesAlongPaths` serves given paths; `GeneratesAlongDecisions` adds what the routers need to know of the prompt.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from .cache import CACHE_NAME
from .graphs import DecodingGraphs
from .paths import path_to_layer_indices

# Arguments of `generate` that say which blocks run.
ROUTING_ARGUMENTS = ("layer_indices", "prompt_mask", "prompt_length", "prompt_width")

MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")  # of torch.compile

LayerIndices = Sequence[int] | Sequence[Sequence[int]] | torch.Tensor


def has_a_path_per_row(layer_indices: LayerIndices) -> bool:
    """Whether `layer_indices` lists one path per row rather than one for the whole batch."""
    return len(layer_indices) > 0 and hasattr(layer_indices[0], "__len__") and getattr(layer_indices[0], "ndim", 1) > 0


def _reason_against_graphs(generation_config) -> str | None:
    """Why `generate` with these settings cannot decode from CUDA graphs, as a clause; None where it can."""
    is_set = generation_config.return_dict_in_generate
    reasons = {
        "beams change their rows at every step (num_beams)": (generation_config.num_beams or 1) > 1,
        "it needs the cache (use_cache)": not generation_config.use_cache,
        "two streams take turns (guidance_scale)": generation_config.guidance_scale not in (None, 1),
        "the whole step is compiled (compile_config)": generation_config.compile_config is not None,
        "it keeps no hidden states (output_hidden_states)": is_set and generation_config.output_hidden_states,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class GeneratesAlongPaths:
    """Mixin for a model with a language-model head whose base model, `self.model`, is a `FollowsPaths`."""

    def compile_blocks(self, **compile_arguments) -> None:
        """Compiles each block for decoding with `torch.compile(**compile_arguments)`.

        One compilation serves all blocks, visits and paths. There is one for each number of rows that run a block
        together; after eight of them (torch's limit) other numbers run uncompiled. The loop over the blocks stays in
        Python, as its path differs from prompt to prompt; where many prompts follow few paths, compiling the whole step
        gains more: `generate(cache_implementation="static", compile_config=CompileConfig())`.

        Pass a static cache (`PathCache(max_cache_len=...)`, or cache_implementation="static" to `generate`), so that
        shapes stay the same. Forward passes over several tokens are not compiled: every length of a prompt would
        be compiled again, and the slots of the cache, which the first pass allocates, get fixed addresses only outside
        of compiled code.

        Raises ValueError for modes with CUDA graphs of their own.
        """
        has_graphs = (compile_arguments.get("options") or {}).get("triton.cudagraphs", False)
        if has_graphs or compile_arguments.get("mode") in MODES_WITH_GRAPHS:
            raise ValueError(
                f"compile_blocks cannot use torch's own CUDA graphs ({compile_arguments}): a block would overwrite "
                "what the one before it hands on; omit the mode, and call decode_with_graphs() for CUDA graphs"
            )
        for block in self.model.layers:
            block.compile(**compile_arguments)

    def decode_with_graphs(self, is_on: bool = True) -> None:
        """Decodes from CUDA graphs, one for each visit of each block; False turns it off and frees their memory.

        Every path is an order of the same graphs, so new paths cost no capture. The first step with a new number of
        rows, or beyond 256, 512, 1024, ... tokens, captures 2L graphs and compares a few steps with eager decoding.
        Prompts run without graphs. Blocks that were compiled (`compile_blocks()`) are captured compiled.

        Buffers take 4 L x rows x tokens x key-value heads x head size numbers (tokens: rounded up as above).

        Raises:
            ValueError: on a CPU, for quantised, sharded or offloaded weights, adapters that are not merged, hooks,
                sliding windows, attention other than "sdpa" and in train mode, here or at a step; and in `generate` for
                beams, assistants, `use_cache=False`, `guidance_scale`, `compile_config` and `output_hidden_states`.
            RuntimeError: at a step, where a capture fails or its steps differ from eager ones.
        """
        if self.model.graphs is not None:
            self.model.graphs.release()
        self.model.graphs = DecodingGraphs(self.model) if is_on else None

    def get_compiled_call(self, compile_config):
        """The compiled decoding step of `generate`. The cache's counts are kept outside of it, because a graph break
        would be refused by `CompileConfig(fullgraph=True)`."""
        compiled_call = super().get_compiled_call(compile_config)

        def call(input_ids=None, **kwargs):
            output = compiled_call(input_ids=input_ids, advances_cache=False, **kwargs)
            cache = kwargs[CACHE_NAME]
            self.model.note_pass(cache.schedule, cache, input_ids.shape[1])
            return output

        return call

    def _assisted_decoding(self, input_ids, *args, **model_kwargs):
        if self.model.graphs is not None:
            raise ValueError("decode_with_graphs does not apply: an assistant sends several tokens at a time")
        if model_kwargs[CACHE_NAME].get_seq_length() > 0:
            raise ValueError(
                f"{CACHE_NAME} already holds tokens, but assisted decoding sends the whole prompt again; pass an empty "
                "cache and the whole prompt, or omit prompt_lookup_num_tokens and assistant_model"
            )
        return super()._assisted_decoding(input_ids, *args, **model_kwargs)

    def _get_candidate_generator(self, generation_config, *args, model_kwargs, **kwargs):
        """As in the stock model; what says which blocks of this model run is no business of an assistant."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit is not supported: the path says which blocks run; use prompt_lookup_num_tokens "
                "or an assistant_model"
            )
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in ROUTING_ARGUMENTS}
        return super()._get_candidate_generator(generation_config, *args, model_kwargs=model_kwargs, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if generation_config.output_attentions and generation_config.return_dict_in_generate:
            raise ValueError(
                "output_attentions is not offered: a repeated block attends twice and a skipped one not at all; "
                "use the stock model to look at attention"
            )
        if self.model.graphs is not None and (reason := _reason_against_graphs(generation_config)):
            raise ValueError(f"decode_with_graphs does not apply: {reason}; call decode_with_graphs(False)")
        for name in {"past_key_values", "cache"} & model_kwargs.keys():  # both are understood in every release
            model_kwargs[CACHE_NAME] = model_kwargs.pop(name)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        """As in the stock model. The stream of a negative prompt always has its cache, which keeps its decision."""
        if generation_config.guidance_scale not in (None, 1) and not generation_config.use_cache:
            generation_config = copy.copy(generation_config)
            generation_config.use_cache = True
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """False: engines with a transformers back end keep no cache of this kind, and would decide at each token."""
        return False

    def init_continuous_batching(self, *_args, **_kwargs):
        """Refused, and with it `generate_batch`: packed prompts have no row of their own."""
        raise ValueError(
            "continuous batching packs many prompts into one row of the batch, but each row has one path; "
            "call generate with a padded batch"
        )

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Whether `generate` compiles the whole decoding step. Each set of paths needs a compilation of its own,
        and torch stops after eight: so only where `compile_config` is given, for paths that many prompts follow."""
        is_requested = generation_config.compile_config is not None
        return is_requested and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **kwargs):
        """With a static cache `generate` prepares the masks of the blocks outside of its compiled forward pass. Not at
        prefill, where that would hide the padding from the routers, and not for graphs: there, the mask [batch, tokens]
        as it is."""
        cache = kwargs.get(CACHE_NAME)
        takes_plain_mask = cache is None or cache.get_seq_length() == 0 or self.model.graphs is not None
        # Nor can `generate` handle the masks of flex attention.
        if takes_plain_mask or self.config._attn_implementation == "flex_attention":
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, layer_indices=None, **kwargs):
        # The stock method repeats tensors for beams and return sequences; a list of paths needs the same.
        cache = kwargs.get(CACHE_NAME)
        if layer_indices is None and expand_size > 1 and (cache is None or cache.get_seq_length() == 0):
            layer_indices = self.model.layer_indices
        if layer_indices is not None and has_a_path_per_row(layer_indices):
            layer_indices = [row for row in layer_indices for _ in range(expand_size)]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        if layer_indices is not None:
            model_kwargs["layer_indices"] = layer_indices
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        # Without a cache nothing else remembers what was decided at prefill.
        if outputs.get(CACHE_NAME) is None and model_kwargs.get("layer_indices") is None:
            model_kwargs["layer_indices"] = [path_to_layer_indices(path) for path in outputs.paths.tolist()]
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


class GeneratesAlongDecisions:
    """Mixin to go before `GeneratesAlongPaths`, where routers decide at prefill."""

    def prepare_inputs_for_generation(
        self,
        input_ids,
        attention_mask=None,
        inputs_embeds=None,
        prompt_mask=None,
        prompt_length=None,
        prompt_width=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """The stock inputs, and at prefill what the routers may read.

        `prompt_width` tokens of the first pass of assisted decoding are the prompt; the others are its candidates.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_first_iteration:
            if prompt_width is not None and inputs.get("inputs_embeds") is None:
                prompt_mask = self._without_candidates(prompt_mask, prompt_width, input_ids, inputs)
            inputs |= {"prompt_mask": prompt_mask, "prompt_length": prompt_length}
            # One prompt per row: `forward` need not look for packed ones, which would wait for the device.
            inputs["is_unpacked"] = True
        return inputs

    @staticmethod
    def _without_candidates(prompt_mask, prompt_width: int, input_ids: torch.Tensor, inputs: dict) -> torch.Tensor:
        num_candidates = input_ids.shape[1] - prompt_width
        if prompt_mask is not None:
            return nn.functional.pad(prompt_mask, (0, num_candidates))
        mask = inputs.get("attention_mask")
        prompt_mask = torch.ones_like(input_ids) if mask is None else mask.clone()
        prompt_mask[:, prompt_width:] = 0
        return prompt_mask

    def _assisted_decoding(self, input_ids, *args, **model_kwargs):
        return super()._assisted_decoding(input_ids, *args, prompt_width=input_ids.shape[1], **model_kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, prompt_length=None, **kwargs):
        # The stock method repeats tensors for beams and return sequences; a list of lengths needs the same.
        if prompt_length is not None:
            kwargs["prompt_length"] = torch.as_tensor(prompt_length)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        cache = model_kwargs.get(CACHE_NAME)
        is_path_known = (
            self.model.is_static_routing
            or model_kwargs.get("layer_indices") is not None
            or self.model.layer_indices is not None
            or (cache is not None and cache.get_seq_length() > 0)
        )
        if generation_config.prefill_chunk_size is not None and not is_path_known:
            raise ValueError(
                "prefill_chunk_size is set, but a router reads the whole prompt before its block runs on any of it; "
                "omit prefill_chunk_size, or pass the path to follow as layer_indices"
            )
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
