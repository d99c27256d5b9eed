"""Rows of all processes, with gradient."""

import torch
import torch.distributed as dist


class _AllGather(torch.autograd.Function):
    """Tensors of equal shape from all processes, `(processes, ...)`; the gradient is summed over them."""

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
    The rows of all processes in the order of their ranks, with gradient; the tensor itself in a single process.

    A loss computed on gathered rows is the same in every process. Its gradient reaches a row once from each process,
    which is the factor that DDP's average over processes takes out again: the result is the gradient of one process
    that holds the whole batch.

    Args:
        tensor (`torch.Tensor` of shape `(rows, ...)`, *optional*): processes may hold different numbers of rows.
    """
    if tensor is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    counts = [int(count) for count in counts]
    padding = tensor.new_zeros(max(counts) - len(tensor), *tensor.shape[1:])
    parts = _AllGather.apply(torch.cat([tensor, padding]))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
