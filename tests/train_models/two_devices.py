"""A routed model spread over two devices that only pretend to be there; run by test_placement.py in its own process.

Fake tensors have a device and a shape but no values, and an operation over two devices fails as on real ones. The
hooks are those that `device_map` puts on a model. Decisions, which need values, are handed in.
"""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from train_models import PathCache, RoutedLlamaConfig, RoutedLlamaForCausalLM, routed

_setup_privateuseone_for_python_backend()
FIRST, SECOND = "privateuseone:0", "privateuseone:1"
ROWS = [[1, 0, 2, 0, 1, 0], [2, 1, 0, 1, 0, 2], [1, 1, 1, 1, 2, 1]]
real_tensor = torch.tensor


def tensor(data, *, device=None, **arguments):
    """`torch.tensor`, which fake tensors do not cover on a device that is not there."""
    made = real_tensor(data, **arguments)
    if device is None or torch.device(device).type == "cpu":
        return made
    return torch.empty(made.shape, dtype=made.dtype, device=device)


class Hook(AlignDevicesHook):
    def init_hook(self, module):
        return module  # the weights are in place


class Known(list):
    """Stands in for a tensor whose values matter: a decision, or the rows to keep."""

    device = torch.device(SECOND)
    dtype = torch.long

    def masked_fill(self, mask, _value):
        assert mask.device == self.device
        return self

    def tolist(self):
        return list(self)


def place(model, name: str, device: str) -> None:
    module = model.get_submodule(name)
    for part in module.modules():
        for key, parameter in part._parameters.items():
            part._parameters[key] = None if parameter is None else torch.nn.Parameter(parameter.to(device))
        for key, buffer in part._buffers.items():
            part._buffers[key] = buffer.to(device)
    hook = Hook(execution_device=device, skip_keys=list(model._skip_keys_device_placement))
    add_hook_to_module(module, hook)


torch.tensor = tensor
with torch.no_grad(), FakeTensorMode():
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    model = RoutedLlamaForCausalLM(RoutedLlamaConfig(num_attention_heads=4, **sizes)).eval()
    for name in ("model.embed_tokens", "model.rotary_emb"):
        place(model, name, FIRST)
    for name in ("model.norm", "lm_head"):
        place(model, name, SECOND)
    for block in range(6):
        place(model, f"model.layers.{block}", FIRST if block < 3 else SECOND)
        place(model, f"model.routers.{block}", FIRST if block % 2 else SECOND)

    decisions = iter(zip(*ROWS, strict=True))
    routed.route = lambda logits, control: Known(next(decisions))
    input_ids = torch.zeros(3, 7, dtype=torch.long, device=FIRST)
    mask = torch.ones_like(input_ids)
    cache = PathCache()
    output = model(input_ids, mask, past_key_values=cache, output_router_logits=True, output_router_inputs=True)
    assert cache.paths == [tuple(row) for row in ROWS]
    assert output.logits.device == torch.device(SECOND)
    assert output.router_logits.shape == (3, 6, 3)
    for slot, layer in enumerate(cache.layers):
        assert not layer.is_initialized or layer.keys.device == torch.device(FIRST if slot % 6 < 3 else SECOND), slot
    cache.batch_select_indices(Known([2, 0]))
    cache.crop(-1)
    mask = mask[:2]
    step = model(input_ids[:2, :1], mask, past_key_values=cache)
    assert step.logits.device == torch.device(SECOND)
    assert cache.paths == [tuple(ROWS[2]), tuple(ROWS[0])]
print("every tensor was where it was used")
