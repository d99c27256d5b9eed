"""How time and memory grow with the batch, the LoRA rank, the number of processes, images and captions."""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import subjects
from caching import MALLOC
from evaluation import captions
from measuring import Settings, alone, forget_peak, growth, imports, peak_mb, row, timed


def scale(settings: Settings) -> Iterator[dict[str, Any]]:
    yield from batches(settings)
    yield from ranks_of_lora(settings)
    yield from processes(settings)
    yield from data_sets(settings)
    yield from captions(settings)


def batches(settings: Settings) -> Iterator[dict[str, Any]]:
    """Gradient caching in mini-batches of 64; on the CPU with a narrow model, because ViT-B/32 is slow there."""
    size = settings.choose("narrow", "narrow", "vit-l-14")
    runs = {
        batch: alone("caching:one_step", settings, environment=MALLOC, size=size, batch=batch, mini_batch_size=64)
        for batch in settings.choose((64, 256), (64, 256, 1024, 4096), (64, 256, 1024, 4096))
    }
    baseline = alone("measuring:imports", settings, environment=MALLOC)
    note = f"{size}, mini-batches of 64"
    yield growth("scale", "seconds a step by batch", {n: run["seconds"] for n, run in runs.items()}, "s", note)
    yield growth(
        "scale", "memory of a step by batch", {n: run["mb"] - baseline for n, run in runs.items()}, "MB", note
    )


def ranks_of_lora(settings: Settings) -> Iterator[dict[str, Any]]:
    size = settings.choose("narrow", "vit-b-32", "vit-l-14")
    batch = settings.choose(16, 8, 64)
    runs = {
        rank: alone("caching:one_step", settings, size=size, batch=batch, mini_batch_size=None, lora_rank=rank)
        for rank in (2, 8, 32, 64)
    }
    baseline = alone("measuring:imports", settings)
    note = f"{size}, batch {batch}"
    yield growth("scale", "seconds a step by LoRA rank", {n: run["seconds"] for n, run in runs.items()}, "s", note)
    yield growth(
        "scale", "memory of a step by LoRA rank", {n: run["mb"] - baseline for n, run in runs.items()}, "MB", note
    )


def processes(settings: Settings) -> Iterator[dict[str, Any]]:
    """The same batch in one process and split over two; on the CPU with one thread per process."""
    import torch

    if settings.device == "cuda" and torch.cuda.device_count() < 2:
        return
    settings = replace(settings, threads=1)
    size, batch = settings.choose("narrow", "vit-b-32", "vit-l-14"), settings.choose(16, 16, 256)
    seconds = {1: [], 2: []}
    for _ in range(settings.choose(1, 2, 3)):
        for count, values in seconds.items():
            values.append(
                alone("scaling:step_of_processes", settings, launcher=launcher(count), size=size, batch=batch)
            )
    speeds = {count: [batch / value for value in values] for count, values in seconds.items()}
    note = f"{size}, batch {batch} in all, one thread a process"
    yield row("scale", "two processes", "one process", "pairs/s", speeds[2], speeds[1], ">= 1.8", note)


def launcher(count: int) -> tuple[str, ...]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    return ("-m", "torch.distributed.run", f"--nproc-per-node={count}", *address)


def step_of_processes(settings: Settings, size: str, batch: int) -> float:
    """Seconds of a step with DDP and negatives gathered from all processes."""
    import torch
    import torch.distributed as dist
    import trainers
    from torch.nn.parallel import DistributedDataParallel

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(settings.threads)
    dist.init_process_group("nccl" if settings.device == "cuda" else "gloo")
    if settings.device == "cuda":
        torch.cuda.set_device(rank)
    model = subjects.gmail(size, settings).train()
    ddp = DistributedDataParallel(model)
    ddp.projection_dim = model.projection_dim
    advance = trainers.bare_step(settings, ddp, batch // count)
    advance()
    dist.barrier()
    steps = settings.choose(2, 2, 20)
    seconds = timed(lambda: [advance() for _ in range(steps)], settings) / steps
    dist.destroy_process_group()
    return seconds


def data_sets(settings: Settings) -> Iterator[dict[str, Any]]:
    """Pairs next to cached embeddings, in random order as an epoch reads them."""
    settings = replace(settings, device="cpu")
    counts = settings.choose((1_000, 10_000), (1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000, 100_000, 1_000_000))
    runs = {count: alone("scaling:read_pairs", settings, count=count) for count in counts}
    for what, unit in {"seconds to open": "s", "seconds a batch": "s", "memory": "MB"}.items():
        points = {count: run[what] for count, run in runs.items()}
        yield growth("scale", f"{what} by images in the data set", points, unit, "batches of 64 by random index")


def read_pairs(settings: Settings, count: int) -> dict[str, float]:
    """A data set of tiny images, memory-mapped, checked and joined with embeddings; then 50 random batches of it."""
    import datasets
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, Features, Image, List, Value

    from gmail_hf.training.checks import check_pairs
    from gmail_hf.training.preparation import EmbeddedPairs

    imports(settings)
    datasets.disable_progress_bars()
    png = subjects.small_png()
    features = Features(generated_image=Image(), caption=Value("string"), image_id=Value("int64"))
    embedded = Features(image_embeds=List(Value("float32"), length=64))
    with tempfile.TemporaryDirectory() as folder:
        with datasets.arrow_writer.ArrowWriter(features=features, path=f"{folder}/pairs.arrow") as writer:
            for start in range(0, count, 10_000):
                rows = range(start, min(start + 10_000, count))
                images = pa.array([{"bytes": png, "path": None}] * len(rows), features["generated_image"].pa_type)
                captions = [f"caption {row}" for row in rows]
                writer.write_table(pa.table({"generated_image": images, "caption": captions, "image_id": list(rows)}))
            writer.finalize()
        with datasets.arrow_writer.ArrowWriter(features=embedded, path=f"{folder}/embeds.arrow") as writer:
            for start in range(0, count, 10_000):
                values = np.ones((min(10_000, count - start), 64), np.float32)
                column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 64)
                writer.write_table(pa.table({"image_embeds": column}))
            writer.finalize()
        forget_peak(settings)
        before = peak_mb(settings)
        began = time.perf_counter()
        pairs = Dataset.from_file(f"{folder}/pairs.arrow")
        check_pairs(pairs, needed=("generated_image", "caption", "image_id"))
        joined = EmbeddedPairs(pairs, real=Dataset.from_file(f"{folder}/embeds.arrow"))
        opened = time.perf_counter()
        order = np.random.default_rng(0).integers(0, count, (50, 64))
        for indices in order:
            joined.__getitems__(indices.tolist())
        batch = (time.perf_counter() - opened) / len(order)
        memory = max(peak_mb(settings) - before, 1.0)
        return {"seconds to open": opened - began, "seconds a batch": batch, "memory": memory}
