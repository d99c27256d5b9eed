"""
One step of every tower by DDP and FSDP2: `torchrun --nproc-per-node=2 sharded_towers.py OUTPUT`.

Each process takes two of the four images; the gradients are those of a loss over all four.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from towers import NAMES, TOWERS, attached, pooled
from transformers.modeling_layers import GradientCheckpointingLayer

from gmail_hf.branches.tower import is_adapter_weight


def step(tower, name, rows, call=None) -> dict[str, torch.Tensor]:
    """The sum of the embeddings' squares, each image through its branch, and the gradients of the branches."""
    call = call or tower
    loss = pooled(call, name, rows, modality=[NAMES[row] for row in rows]).square().sum()
    loss.backward()
    grads = {key: p.grad for key, p in tower.named_parameters() if is_adapter_weight(key) and p.grad is not None}
    grads = {key: grad.full_tensor() if isinstance(grad, DTensor) else grad for key, grad in grads.items()}
    return {"loss": loss.detach(), **grads}


def main(output: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows = [0, 1] if rank == 0 else [2, 3]
    found = {}
    for name in TOWERS:
        tower = attached(name).train()
        parallel = DistributedDataParallel(tower)
        found |= {f"ddp/{name}/{key}": tensor for key, tensor in step(tower, name, rows, parallel).items()}
        tower = attached(name).train()
        for module in tower.modules():
            if isinstance(module, GradientCheckpointingLayer):
                fully_shard(module)
        fully_shard(tower)
        found |= {f"fsdp2/{name}/{key}": tensor for key, tensor in step(tower, name, rows).items()}
    save_file(found, Path(output, f"{rank}.safetensors"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
