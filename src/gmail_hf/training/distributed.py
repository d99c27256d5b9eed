"""Gathering rows from all processes, with gradient."""

import torch
import torch.distributed as dist


class _AllGather(torch.autograd.Function):
    """Gather tensors of equal shape into `(processes, ...)`; the gradient is summed over the processes."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def gather(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """
    Gather the rows of all processes in the order of their ranks, with gradient. A single process gets its own tensor.

    A loss computed on gathered rows is the same in every process. Each process adds its gradient to a row, and DDP
    averages over the processes, so the result equals the gradient of a single process with the complete batch.

    Args:
        tensor (`torch.Tensor` of shape `(rows, ...)`, *optional*): the number of rows may differ between processes.
    """
    if tensor is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    counts = [int(count) for count in counts]
    padding = tensor.new_zeros(max(counts) - len(tensor), *tensor.shape[1:])
    parts = _AllGather.apply(torch.cat([tensor, padding]))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
