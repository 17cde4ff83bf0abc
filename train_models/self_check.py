"""Whether this code works with a release of transformers that it was not tested with, on a toy of two blocks.

A newer release can rename an argument and leave a model that runs but answers wrongly. So under an unknown release the
first loading of a family compares a toy of it with the stock model, and refuses to load where they differ.
"""

from functools import cache as once

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ._releases import how_to_install, is_tested

TOY = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SKIP_AND_REPEAT = [1, 1]  # of the two blocks the first is skipped and the second runs twice
NEW_TOKENS = 3
RUNS_ANYWHERE = ("sdpa", "eager")  # the other back ends need a card, or time to compile their kernels
TOLERANCE = 1e-4


def check_model(model: PreTrainedModel) -> None:
    """Raises ImportError, with the releases that work, if the code of `model` fails under the installed release.

    Does nothing under a tested release, and once per process for each family and attention back end otherwise. Back
    ends that do not run on every machine are checked as "sdpa".
    """
    if is_tested(transformers.__version__):
        return
    implementation = model.config._attn_implementation
    model_class = getattr(model, "causal_lm_type", type(model))  # the base model's, which has no `generate`
    _check_once(model_class, implementation if implementation in RUNS_ANYWHERE else "sdpa")


@once
def _check_once(model_class: type, implementation: str) -> None:
    try:
        failure = _failure(model_class, implementation)
    except Exception as error:  # whatever a release that nobody has seen raises
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    if failure is not None:
        raise ImportError(
            f"the code of {model_class.__name__} does not work with transformers {transformers.__version__} and "
            f"attn_implementation='{implementation}' ({failure}); run {how_to_install()}"
        )


def _failure(model_class: type, implementation: str) -> str | None:
    """What is wrong in the words of the sentence, or None."""
    # Everything is on the CPU, whose generator is restored: a seed gives the same numbers as under a tested release.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        routed, stock = _toys(model_class, implementation)
        tokens = torch.tensor([[3, 5, 7, 11, 13], [2, 4, 6, 8, 10]])
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        default = list(range(len(routed.model.layers)))
        for path, name in ((default, "the base model's path"), (SKIP_AND_REPEAT, "a path with a skip and a repeat")):
            expected = _decoded(_along(stock, path), tokens, mask, use_cache=False)
            arguments = _follow(routed, path, path == default)
            for use_cache in (True, False):
                actual = _decoded(routed, tokens, mask, use_cache=use_cache, **arguments)
                if not torch.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE):
                    return f"{'cached' if use_cache else 'uncached'} decoding along {name} is wrong"
                if use_cache and routed.block_applications.tolist() != [NEW_TOKENS * len(path)] * len(tokens):
                    return f"cached decoding along {name} loses the path"
    return None


def _toys(model_class: type, implementation: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(a toy of `model_class`, the stock model on its weights), both on the CPU in float32."""
    stock_class = next(base for base in model_class.__mro__ if base.__module__.startswith("transformers.models."))
    models = []
    for toy_class in (model_class, stock_class):
        config = toy_class.config_class(**TOY)
        config._attn_implementation = implementation
        toy = toy_class(config).float().eval()
        for number, parameter in enumerate(toy.parameters()):  # those of the routers come last
            values = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
            parameter.copy_(torch.sin(values * 1.7 + number) * 0.5 + (parameter.ndim == 1))
        models.append(toy)
    routed, stock = models
    stock.load_state_dict({name: value for name, value in routed.state_dict().items() if ".routers." not in name})
    return routed, stock


def _along(stock: PreTrainedModel, path: list[int]) -> PreTrainedModel:
    """The stock model with the blocks of `path` in its order, which is right only without a cache."""
    blocks = stock.model.layers
    stock.model.layers = nn.ModuleList(blocks[index] for index in path)
    stock.config.num_hidden_layers = len(path)
    return stock


def _follow(routed: PreTrainedModel, path: list[int], is_static: bool) -> dict:
    """Makes `routed` follow `path`, by its routers where it has some; returns the arguments for `generate`."""
    if not hasattr(routed.model, "routers"):
        return {"layer_indices": path}
    routed.model.is_static_routing = is_static
    for block, router in enumerate(routed.model.routers):
        router.layers[-1].weight.zero_()
        router.layers[-1].bias.copy_(torch.arange(3) == path.count(block))
    return {}


def _decoded(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, **arguments) -> torch.Tensor:
    """[batch, NEW_TOKENS, vocabulary]: the logits of greedy decoding after left-padded prompts."""
    output = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    return torch.stack(output.logits, dim=1)


class ChecksItself:
    """Mixin for a model: where it is loaded or its attention back end is set, `check_model` looks at its code."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in the stock model. Raises ImportError, with the releases that work, where this one does not."""
        loaded = super().from_pretrained(*args, **kwargs)
        check_model(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def _from_config(cls, *args, **kwargs):
        model = super()._from_config(*args, **kwargs)
        check_model(model)
        return model

    def set_attn_implementation(self, *args, **kwargs) -> None:
        """As in the stock model; checks the code as loading does."""
        super().set_attn_implementation(*args, **kwargs)
        check_model(self)
