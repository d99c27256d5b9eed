"""
Gradient caching: a large batch at the memory of a mini-batch, and what that costs in time.

A batch of 1,024 in mini-batches of 64 cannot be compared: plain, ViT-L/14's activations need some 155 GB. So it is
as many mini-batches of fewer pairs: 256 in mini-batches of 16 on CUDA, on the CPU 128 in those of 8 of ViT-B/32.
The images of the whole batch count in the peak; beside ViT-L/14's activations they are a smaller part.
"""

from collections.abc import Iterator
from typing import Any

import subjects
import trainers
from measuring import Settings, alone, forget_peak, imports, peak_mb, row, timed


def cached(settings: Settings) -> Iterator[dict[str, Any]]:
    """Peak memory against a plain batch of a mini-batch's size, time against a plain batch of the whole size."""
    size = settings.size or settings.choose("narrow", "vit-b-32", "vit-l-14")
    mini, batch = settings.choose(4, 8, 16), settings.choose(64, 128, 256)
    kinds = {"cached": (batch, mini), "plain": (batch, None), "plain mini-batch": (mini, None)}
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(settings.choose(1, 2, 3)):
        baseline = alone("measuring:imports", settings)
        for kind, (pairs, mini_batch_size) in kinds.items():
            run = alone("caching:one_step", settings, size=size, batch=pairs, mini_batch_size=mini_batch_size)
            runs[kind].append(run | {"mb": run["mb"] - baseline})
    mb = {kind: [run["mb"] for run in runs[kind]] for kind in kinds}
    seconds = {kind: [run["seconds"] for run in runs[kind]] for kind in kinds}
    measured = f"batch {batch} in mini-batches of {mini}"
    yield row(
        "cached",
        f"{measured}, memory",
        f"plain batch {mini}",
        "MB",
        mb["cached"],
        mb["plain mini-batch"],
        "<= 1.15",
        size,
    )
    yield row("cached", f"{measured}, memory", f"plain batch {batch}", "MB", mb["cached"], mb["plain"], note=size)
    yield row(
        "cached", f"{measured}, time", f"plain batch {batch}", "s", seconds["cached"], seconds["plain"], "<= 1.5", size
    )


def one_step(
    settings: Settings, size: str, batch: int, mini_batch_size: int | None, **fields: Any
) -> dict[str, float]:
    """Seconds of a step after a small one, and the peak of the process."""
    imports(settings)
    model = subjects.gmail(size, settings, **fields).train()
    trainers.bare_step(settings, model, 2)()
    advance = trainers.bare_step(settings, model, batch, mini_batch_size)
    forget_peak(settings)  # of making the model
    return {"seconds": timed(advance, settings), "mb": peak_mb(settings)}
