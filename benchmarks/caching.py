"""
Gradient caching: a large batch with the memory of a mini-batch, and its cost in time.

The activations of a plain batch of 1,024 need some 43 GB for ViT-B/32 and 300 GB for ViT-L/14. The time of 1,024 pairs
in mini-batches of 64 is therefore compared with plain batches of 64, which do the same operations, forward and
backward once. Smaller batches with the same number of mini-batches are compared with one plain batch of the same
pairs. The peak includes the images of the complete batch in 8 bits, as in `GmailTrainer`.

On a CPU all sides run with `MALLOC`, otherwise the peak would depend on the allocator: the small graph of each
mini-batch is kept between large freed blocks, which glibc 2.36 does not reuse. A separate row shows this effect.
"""

from collections.abc import Iterator
from typing import Any

import subjects
import trainers
from measuring import Settings, alone, forget_peak, imports, peak_mb, row, timed

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "100000"}  # bytes; larger blocks are returned to the system when freed


def cached(settings: Settings) -> Iterator[dict[str, Any]]:
    """Peak memory against a plain batch of a mini-batch's size, and time against plain batches of the same pairs."""
    size = settings.size or settings.choose("narrow", "vit-b-32", "vit-l-14")
    for batch, mini, whole in settings.choose(
        [(64, 4, True)], [(128, 8, True), (1024, 64, False)], [(256, 16, True), (1024, 64, False)]
    ):
        yield from compared(settings, size, batch, mini, whole)
    if settings.device == "cpu":
        yield allocators(settings, size, *settings.choose((64, 16), (256, 64), None))


def compared(settings: Settings, size: str, batch: int, mini: int, whole: bool) -> Iterator[dict[str, Any]]:
    """`batch` pairs in mini-batches, compared with one plain batch (`whole`) or with many of a mini-batch's size."""
    kinds = {"cached": (batch, mini), "plain mini-batch": (mini, None)} | ({"plain": (batch, None)} if whole else {})
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(settings.choose(1, 2, 3)):
        baseline = alone("measuring:imports", settings, environment=MALLOC)
        for kind, (pairs, mini_batch_size) in kinds.items():
            chosen = {"size": size, "batch": pairs, "mini_batch_size": mini_batch_size}
            run = alone("caching:one_step", settings, environment=MALLOC, **chosen)
            runs[kind].append(run | {"mb": run["mb"] - baseline})
    mb = {kind: [run["mb"] for run in runs[kind]] for kind in kinds}
    seconds = {kind: [run["seconds"] for run in runs[kind]] for kind in kinds}
    measured = f"batch {batch} in mini-batches of {mini}"
    small = mb["plain mini-batch"]
    yield row("cached", f"{measured}, memory", f"plain batch {mini}", "MB", mb["cached"], small, "<= 1.15", size)
    if whole:
        yield row("cached", f"{measured}, memory", f"plain batch {batch}", "MB", mb["cached"], mb["plain"], note=size)
        against, theirs = f"plain batch {batch}", seconds["plain"]
    else:
        against = f"{batch // mini} plain batches of {mini}"
        theirs = [batch // mini * second for second in seconds["plain mini-batch"]]
    yield row("cached", f"{measured}, time", against, "s", seconds["cached"], theirs, "<= 1.5", size)


def allocators(settings: Settings, size: str, batch: int, mini: int) -> dict[str, Any]:
    """The peak of the same step with the default settings of the system's allocator."""
    chosen = {"size": size, "batch": batch, "mini_batch_size": mini}
    peaks = []
    for environment in ({}, MALLOC):
        baseline = alone("measuring:imports", settings, environment=environment)
        peaks.append(alone("caching:one_step", settings, environment=environment, **chosen)["mb"] - baseline)
    measured = f"batch {batch} in mini-batches of {mini}, the allocator as it is, memory"
    against = " ".join(f"{name}={value}" for name, value in MALLOC.items())
    return row("cached", measured, against, "MB", peaks[:1], peaks[1:], note=size)


def one_step(
    settings: Settings, size: str, batch: int, mini_batch_size: int | None, **fields: Any
) -> dict[str, float]:
    """Seconds of a step after a step with a mini-batch, and the peak of the process."""
    imports(settings)
    model = subjects.gmail(size, settings, **fields).train()
    trainers.bare_step(settings, model, mini_batch_size or batch, eight_bit=True)()
    advance = trainers.bare_step(settings, model, batch, mini_batch_size, eight_bit=True)
    forget_peak(settings)  # that of creating the model
    return {"seconds": timed(advance, settings), "mb": peak_mb(settings)}
