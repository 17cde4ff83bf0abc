"""The processes that share the work."""

import datetime

import torch
from accelerate import PartialState


def process_state(patience: datetime.timedelta) -> PartialState:
    """The processes of accelerate launch or torchrun; one process without them.

    Args:
        patience: how long a process that is done with its share waits for the others.
    """
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return PartialState(cpu=on_cpu, timeout=patience)
