"""Routed models whose rows decide differently."""

import pytest
import torch

from train_models import retrofit


@pytest.fixture(scope="session")
def decisive(stock_checkpoint):
    """(family, changes of the configuration, **retrofit arguments) -> a routed model in eval mode.

    Its router weights are larger than at initialisation, so that the rows of random prompts decide differently.
    """

    def make(family: str = "llama", changes: dict | None = None, **arguments):
        arguments.setdefault("dtype", torch.float32)
        model = retrofit(stock_checkpoint(family, **(changes or {})), **arguments).eval()
        with torch.no_grad():
            for router in model.model.routers:
                router.layers[-1].weight.mul_(40)
        return model

    return make
