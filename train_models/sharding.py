"""Models whose weights are sharded over processes, which gather the weights of a block together.

Under FSDP and ZeRO-3 each process calls every block, and the calls pair up one to one. Prompts of different processes
take different paths, so a process also calls a block that only another one visits, and drops what comes out.
"""

import torch
from torch import distributed, nn

# Compared by name, because not every supported torch has both classes.
FSDP_CLASSES = {"FullyShardedDataParallel", "FSDPModule"}


def is_sharded(blocks: nn.ModuleList) -> bool:
    """Whether calling one of `blocks` gathers its weights from several processes (FSDP, FSDP2 or ZeRO-3)."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    block = blocks[0]
    if FSDP_CLASSES & {base.__name__ for base in type(block).__mro__}:
        return True
    return hasattr(next(block.parameters(), None), "ds_id")  # what DeepSpeed marks a sharded parameter with


def visits_elsewhere(own_visits: int, device: torch.device) -> int:
    """How many more visits of a block than `own_visits` some process makes.

    All processes call it together and before the visits, whose gathers must come in one order everywhere. `device` is
    that of the hidden states, where the processes communicate.
    """
    most = torch.tensor(own_visits, device=device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most) - own_visits


def in_step(hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """`hidden_states` [batch, T, d] unchanged, with the block that gave `output` in its graph.

    So the backward pass visits the block in this process, too, with gradients of zero.
    """
    no_rows = torch.empty(0, dtype=torch.int64, device=hidden_states.device)
    return hidden_states.index_copy(0, no_rows, output[:0].to(hidden_states.device))
