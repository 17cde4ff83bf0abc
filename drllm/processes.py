"""The processes that share the work."""

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Made = TypeVar("Made")


def process_state(patience: datetime.timedelta) -> PartialState:
    """The processes of accelerate launch or torchrun; one process without them.

    Args:
        patience: how long a process that is done with its share waits for the others.
    """
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return PartialState(cpu=on_cpu, timeout=patience)


def from_main(state: PartialState, make: Callable[[], Made]) -> Made:
    """What `make` returns on the main process, on every process."""
    made = [make() if state.is_main_process else None]
    return made[0] if state.num_processes == 1 else broadcast_object_list(made)[0]


def helper_count() -> int:
    """How many helpers work beside this process: its share of the machine's cores, one of which it needs itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)  # set by accelerate launch and torchrun
