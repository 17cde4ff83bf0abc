"""All routers as one module: the same logits, gradients and weights as the separate ones."""

import pytest
import torch

from drllm.questions.padding import pad_ids
from drllm.training.losses import routing_loss
from drllm.training.router_modules import FullModelRouters, StackedRouters, init_final_biases
from train_models import RouterBlock, retrofit
from train_models.paths import path_to_layer_indices

LAYERS, HIDDEN = 4, 12


def make_routers(depth: int = 2, width: int = 7) -> torch.nn.ModuleList:
    torch.manual_seed(3)
    routers = torch.nn.ModuleList(RouterBlock(HIDDEN, width, depth) for _ in range(LAYERS))
    for parameter in routers.parameters():
        torch.nn.init.normal_(parameter)  # biases too
    return routers


def make_batch(layers: int = LAYERS, num_windows: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    windows = torch.randn(6, layers, num_windows, HIDDEN, generator=generator)
    mask = torch.arange(num_windows) < torch.tensor([1, 5, 3, 5, 2, 4])[:, None]
    return windows, mask, torch.randint(0, 3, (6, LAYERS), generator=generator)


def separate_logits(routers, windows, mask) -> torch.Tensor:
    shared = windows.shape[1] == 1
    return torch.stack([router(windows[:, 0 if shared else r], mask) for r, router in enumerate(routers)], 1)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("stored_layers", [LAYERS, 1])
def test_logits_and_gradients_are_those_of_separate_routers(depth, stored_layers):
    routers = make_routers(depth)
    windows, mask, labels = make_batch(stored_layers)
    alpha = torch.tensor([0.5, 1.0, 1.5])
    stacked = StackedRouters(routers)

    expected = separate_logits(routers, windows, mask)
    routing_loss(expected, labels, "focal", alpha).mean().backward()
    found = stacked(windows, mask)["logits"]
    routing_loss(found, labels, "focal", alpha).mean().backward()

    torch.testing.assert_close(found, expected)
    for r, router in enumerate(routers):
        linears = [m for m in router.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linears) == depth
        for k, linear in enumerate(linears):
            torch.testing.assert_close(stacked.weights[k].grad[r].t(), linear.weight.grad)
            torch.testing.assert_close(stacked.biases[k].grad[r], linear.bias.grad)


def test_what_lies_in_invalid_windows_does_not_matter():
    stacked = StackedRouters(make_routers())
    windows, mask, _ = make_batch()
    changed = torch.where(mask[:, None, :, None], windows, torch.full_like(windows, 7.0))
    assert torch.equal(stacked(windows, mask)["logits"], stacked(changed, mask)["logits"])


def test_copy_to_writes_every_weight_back():
    routers, others = make_routers(), make_routers()
    for parameter in others.parameters():
        parameter.data.zero_()
    StackedRouters(routers).copy_to(others)
    for (name, a), (_, b) in zip(routers.named_parameters(), others.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    half = make_routers().to(torch.bfloat16)
    StackedRouters(routers).copy_to(half)
    assert torch.equal(half[2].layers[0].weight, routers[2].layers[0].weight.to(torch.bfloat16))


def test_biases_from_class_frequencies():
    routers = make_routers()
    before = routers[0].layers[0].bias.clone()
    init_final_biases(routers, torch.tensor([9, 79, 9]))
    for router in routers:
        assert router.layers[-1].bias.softmax(-1).tolist() == pytest.approx([0.1, 0.8, 0.1])
    assert torch.equal(routers[0].layers[0].bias, before)
    init_final_biases(routers, torch.tensor([0, 5, 0]))  # absent classes stay finite
    assert torch.isfinite(routers[0].layers[-1].bias).all()


@pytest.fixture
def routed(stock_checkpoint):
    return retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()


PATHS = [(1, 1, 0, 2, 1, 1), (2, 0, 1, 1, 0, 1)]


def full_model_batch() -> dict[str, torch.Tensor]:
    return pad_ids([range(1, 30), (3, 4, 5)], 0) | {"paths": torch.tensor(PATHS)}


def test_the_full_model_follows_labels_under_teacher_forcing(routed):
    batch = full_model_batch()
    found = FullModelRouters(routed, teacher_forcing=True)(**batch)["logits"]
    indices = [path_to_layer_indices(path) for path in PATHS]
    del batch["paths"]
    torch.testing.assert_close(found, routed(**batch, layer_indices=indices, output_router_logits=True).router_logits)


def test_the_full_model_follows_its_own_decisions_without(routed):
    batch = full_model_batch()
    module = FullModelRouters(routed, teacher_forcing=False)
    found = module(**batch)["logits"]
    del batch["paths"]
    own = routed(**batch, output_router_logits=True)
    torch.testing.assert_close(found, own.router_logits)
    assert torch.equal(own.router_logits.argmax(-1), own.paths.long())
    assert module.statistics.block_applications == own.paths.sum()
    found.sum().backward()
    assert all(router.layers[0].weight.grad is not None for router in routed.model.routers)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"routers"}
