"""
Stage 1: a step of `GmailTrainer` compared with the common alternatives, in time and in memory.

All sides use the same pairs of JPEGs and batches, and train the same LoRA targets with AdamW in the same precision. A
round is one short training of each side. It includes loading, but not the first step. Ours embeds the real images once
before training (`cache_real_embeds`), which is not part of a step.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import subjects
import trainers
from measuring import (
    MissingPeer,
    Settings,
    alone,
    forget_peak,
    imports,
    missing,
    peak_mb,
    row,
    take_turns,
    timed,
)

TWO_CLIPS = "(a) PyTorch: two CLIPs, PEFT on one, real images recomputed"
SENTENCE_TRANSFORMERS = "(b) sentence-transformers, MultipleNegativesRankingLoss"
BARE = "(c) the same tower on tensors in memory, no Trainer, no loading"


def sizes(settings: Settings) -> dict[str, Any]:
    """The model, the pairs per step, the number of measured steps and the rounds."""
    size = settings.size or settings.choose("vit-b-32", "vit-b-32", "vit-l-14")
    return {
        "size": size,
        "batch": settings.batch or settings.choose(2, 16, 64),
        "steps": settings.choose(2, 2, 20),
        "rounds": settings.choose(2, 5, 3),
    }


def step(settings: Settings) -> Iterator[dict[str, Any]]:
    """Pairs/s of our trainer, compared with each other side."""
    import torch

    chosen = sizes(settings)
    rounds = chosen.pop("rounds")
    with working_folder():
        sides = {"ours": trainers.gmail_trainer(settings, **chosen)}
        for name, build in (
            (TWO_CLIPS, trainers.two_clips),
            (SENTENCE_TRANSFORMERS, trainers.sentence_transformers),
            (BARE, trainers.bare_loop),
        ):
            try:
                sides[name] = build(settings, **chosen)
                if settings.device == "cuda":
                    sides[name]()  # warms up, and fails if it does not fit
            except torch.OutOfMemoryError:
                del sides[name]
                yield missing("step", "GmailTrainer, stage 1", name, "out of memory")
            except MissingPeer as reason:
                yield missing("step", "GmailTrainer, stage 1", name, str(reason))
        speeds = take_turns(sides, rounds)
    ours = speeds.pop("ours")
    note = f"{chosen['size']}, batch {chosen['batch']}"
    for name, theirs in speeds.items():
        aim = ">= 0.95" if name == BARE else ">= 1.5"
        yield row("step", "GmailTrainer, stage 1", name, "pairs/s", ours, theirs, aim, note)
    floor = floor_pairs_per_second(settings, chosen["size"], chosen["batch"])
    yield row(
        "step",
        "GmailTrainer, stage 1",
        "its operations at the rate of its largest product",
        "pairs/s",
        ours,
        [floor] * rounds,
        note=note,
    )


def memory(settings: Settings) -> Iterator[dict[str, Any]]:
    """Peak memory of training minus that of a process with the same imports. Each side has its own process."""
    chosen = sizes(settings) | {"steps": 1, "batch": settings.batch or settings.choose(4, 24, 64)}
    del chosen["rounds"]
    builders = {"ours": "gmail_trainer", TWO_CLIPS: "two_clips", SENTENCE_TRANSFORMERS: "sentence_transformers"}
    names = list(builders)
    peaks = {name: [] for name in builders}
    for _ in range(settings.choose(1, 2, 2)):
        baseline = alone("measuring:imports", settings)
        for name in names:
            try:
                peaks[name].append(alone("training:peak", settings, builder=builders[name], **chosen) - baseline)
            except MissingPeer as reason:
                yield missing("memory", "GmailTrainer, stage 1", name, str(reason))
                names = [other for other in names if other != name]
    note = f"{chosen['size']}, batch {chosen['batch']}"
    for name in names[1:]:
        aim = "<= 0.6" if name == TWO_CLIPS else None
        yield row("memory", "GmailTrainer, stage 1", name, "MB", peaks["ours"], peaks[name], aim, note)


def peak(settings: Settings, builder: str, **chosen: Any) -> float:
    imports(settings)
    with working_folder():
        train = getattr(trainers, builder)(settings, **chosen)
        forget_peak(settings)  # that of creating the model
        train()
        return peak_mb(settings)


@contextmanager
def working_folder() -> Iterator[None]:
    """A temporary working folder, also for cached embeddings."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    before = datasets.config.HF_DATASETS_CACHE, os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        os.chdir(folder)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before[0]
            os.chdir(before[1])


def floor_pairs_per_second(settings: Settings, size: str, batch: int) -> float:
    """Pairs/s if all operations of a step ran at the rate of the product of the tokens and fc1's weight."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = subjects.gmail(size, settings, lora_rank=trainers.RANK, lora_alpha=trainers.ALPHA).train()
    few = min(batch, 4)
    with FlopCounterMode(display=False) as counter:
        trainers.bare_step(settings, model, few)()
    weight = model.vision_model.encoder.layers[0].mlp.fc1.weight.detach()
    tokens = batch * model.vision_model.embeddings.position_embedding.num_embeddings
    states = torch.randn(tokens, weight.shape[1], device=settings.device)
    dtype = getattr(torch, settings.dtype)
    states, weight = states.to(dtype), weight.to(dtype).t()
    repeats = settings.choose(3, 10, 100)
    states @ weight
    seconds = timed(lambda: [states @ weight for _ in range(repeats)], settings) / repeats
    rate = 2 * states.numel() * weight.shape[1] / seconds
    return rate / (counter.get_total_flops() / few)
