"""Sharded models on two processes, whose prompts follow different paths; run by test_sharding.py under torchrun.

usage: torchrun --nproc_per_node 2 two_ranks.py CHECKPOINT fsdp|fsdp2|ddp

Prints the largest difference to the model of one process: of logits, of decoded tokens and of gradients.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from train_models import RoutedLlamaForCausalLM

PATHS = [[0, 1, 2, 2, 4, 5], [0, 1, 1, 2, 3, 5]]  # of rank 0 without block 3, of rank 1 without block 4


def load(checkpoint: str) -> nn.Module:
    return RoutedLlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def sharded(model: nn.Module, kind: str) -> nn.Module:
    if kind == "fsdp":
        policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
        )
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def gradient_of_a_norm(model: nn.Module, block: int) -> torch.Tensor:
    """The sum of the gradient of one weight of a block, over all processes."""
    inner = model.module if hasattr(model, "module") else model
    gradient = inner.model.layers[block].input_layernorm.weight.grad
    if isinstance(gradient, DTensor):
        return gradient.full_tensor().sum()
    total = torch.zeros(()) if gradient is None else gradient.sum()  # None in a process that holds no part of it
    if isinstance(model, FullyShardedDataParallel):
        distributed.all_reduce(total)
    return total


def main() -> None:
    checkpoint, kind = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    every_prompt = torch.randint(2, 61, (2, 11), generator=torch.Generator().manual_seed(0))
    prompt = every_prompt[rank : rank + 1]
    alone, model = load(checkpoint), sharded(load(checkpoint), kind)
    differences = {}
    with torch.no_grad():
        for name, arguments in (("given", {"layer_indices": PATHS[rank]}), ("decided", {})):
            expected, actual = alone(prompt, **arguments), model(prompt, **arguments)
            assert torch.equal(actual.paths, expected.paths)
            differences[name] = (actual.logits - expected.logits).abs().max()
    paths = [torch.zeros_like(expected.paths) for _ in range(2)]
    distributed.all_gather(paths, expected.paths)
    assert not torch.equal(*paths), "the processes should decide differently"
    if kind != "ddp":
        arguments = {"max_new_tokens": 5, "do_sample": False, "synced_gpus": True}
        inner = model.module if kind == "fsdp" else model
        if kind == "fsdp":
            with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False), torch.no_grad():
                tokens = inner.generate(prompt, **arguments)
        else:
            tokens = inner.generate(prompt, **arguments)
        differences["tokens"] = (tokens != alone.generate(prompt, max_new_tokens=5, do_sample=False)).sum()
    losses = [alone(every_prompt[row : row + 1], layer_indices=PATHS[row], prompt_length=[11]) for row in range(2)]
    (sum(output.logits.square().mean() for output in losses) / 2).backward()
    model.train()
    model(prompt, layer_indices=PATHS[rank]).logits.square().mean().backward()
    for block in (2, 3, 4):
        expected = alone.model.layers[block].input_layernorm.weight.grad.sum()
        differences[f"gradient of block {block}"] = (gradient_of_a_norm(model, block) - expected).abs() / 10
    for name, difference in differences.items():
        print(f"rank {rank}: {name}: {float(difference):.2e}", flush=True)
        assert difference <= (1e-5 if "gradient" in name else 0), name
    distributed.barrier()
    print(f"rank {rank} done", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
