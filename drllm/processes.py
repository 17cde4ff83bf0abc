"""The processes that share the work."""

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed import DistError, distributed_c10d

from drllm.errors import UserError

Made = TypeVar("Made")
MEETING = datetime.timedelta(minutes=10)  # a launcher that was killed leaves processes that wait for the others in vain


def process_state(patience: datetime.timedelta) -> PartialState:
    """The processes of accelerate launch or torchrun; one process without them.

    Args:
        patience: how long a process that is done with its share waits for the others, once all have met.

    Raises:
        UserError: the others did not come within `MEETING`.
    """
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    try:
        state = PartialState(cpu=on_cpu, timeout=MEETING)
        state.wait_for_everyone()
    except DistError as error:
        raise UserError(
            f"the processes did not meet within {MEETING.total_seconds() / 60:g} minutes, so one of them or the "
            f"launcher has ended; start all of them again ({str(error).splitlines()[0][:100]})"
        ) from None
    if state.num_processes > 1:
        distributed_c10d._set_pg_timeout(patience)
    return state


def from_main(state: PartialState, make: Callable[[], Made]) -> Made:
    """What `make` returns on the main process, on every process."""
    made: list[Any] = [make() if state.is_main_process else None]
    return made[0] if state.num_processes == 1 else broadcast_object_list(made)[0]


def helper_count() -> int:
    """How many helpers work beside this process: its share of the machine's cores, one of which it needs itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1)  # set by accelerate launch and torchrun
