"""What the Trainer trains: all routers as one module, over stored router inputs or over the full model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from drllm.training.features import PassStatistics
from train_models.paths import path_to_layer_indices


class StackedRouters(nn.Module):
    """All L routers of a model as one: weights stacked over routers, one batched matrix product per linear layer.

    Starts from the weights of the given RouterBlocks, in float32; `copy_to` writes them back. Logits and gradients are
    those of the separate routers.
    """

    def __init__(self, routers: Sequence[nn.Module]):
        super().__init__()
        linears = [[m for m in router.modules() if isinstance(m, nn.Linear)] for router in routers]
        depth = range(len(linears[0]))
        self.weights = nn.ParameterList(
            torch.stack([router[k].weight.detach().float().t() for router in linears]) for k in depth
        )
        self.biases = nn.ParameterList(
            torch.stack([router[k].bias.detach().float() for router in linears]) for k in depth
        )

    def forward(self, windows: torch.Tensor, window_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of every router.

        Args:
            windows: [B, L, W, d], or [B, 1, W, d] when all routers read the embeddings.
            window_mask: bool [B, W].

        Returns:
            {"logits": float32 [B, L, 3]}: votes of the valid windows, averaged.
        """
        batch, _, num_windows, hidden_size = windows.shape
        layers = self.weights[0].shape[0]
        x = windows.to(self.weights[0].dtype).transpose(0, 1).reshape(-1, batch * num_windows, hidden_size)
        x = x.expand(layers, -1, -1)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if k:
                x = F.gelu(x)
            x = torch.baddbmm(bias.unsqueeze(1), x, weight)
        votes = x.float().view(layers, batch, num_windows, -1)
        valid = window_mask.float()[None, :, :, None]
        logits = (votes * valid).sum(2) / valid.sum(2).clamp_min(1)
        return {"logits": logits.transpose(0, 1)}

    @torch.no_grad()
    def copy_to(self, routers: Sequence[nn.Module]) -> None:
        """Write the weights into separate RouterBlocks, in their dtype."""
        for r, router in enumerate(routers):
            linears = [m for m in router.modules() if isinstance(m, nn.Linear)]
            for k, linear in enumerate(linears):
                linear.weight.copy_(self.weights[k][r].t())
                linear.bias.copy_(self.biases[k][r])


class FullModelRouters(nn.Module):
    """The full routed model at every step; only its routers are parameters.

    With teacher forcing the model follows the labelled paths, without it the routers' own decisions. No gradient flows
    through a decision or through the hidden states: each router learns from its own loss.
    """

    def __init__(self, routed, teacher_forcing: bool):
        super().__init__()
        self.routers = routed.model.routers
        self.teacher_forcing = teacher_forcing
        self._routed = (routed,)  # inside a tuple, so that torch does not register the base weights
        self.statistics = PassStatistics()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, paths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """{"logits": float32 [B, L, 3]} for prompts [B, T]; paths [B, L] are followed under teacher forcing."""
        (routed,) = self._routed
        start = time.perf_counter()
        output = routed.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            layer_indices=[path_to_layer_indices(p) for p in paths.tolist()] if self.teacher_forcing else None,
            use_cache=False,
            output_router_logits=True,
        )
        self.statistics.examples += len(input_ids)
        self.statistics.forward_passes += 1
        self.statistics.block_applications += int(routed.block_applications.sum())
        self.statistics.seconds += time.perf_counter() - start
        return {"logits": output.router_logits}


@torch.no_grad()
def init_final_biases(routers: Sequence[nn.Module], counts: torch.Tensor) -> None:
    """Set every router's output bias to the log frequency of the classes, counts [3] smoothed by one.

    An untrained router then predicts the class shares of the training labels rather than a third each.
    """
    smoothed = counts.double() + 1
    log_frequency = (smoothed / smoothed.sum()).log()
    for router in routers:
        final = [m for m in router.modules() if isinstance(m, nn.Linear)][-1]
        final.bias.copy_(log_frequency)
