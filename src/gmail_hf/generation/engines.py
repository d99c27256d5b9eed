"""Runs that make all shards: one process, many under accelerate or torchrun, Slurm arrays, Ray."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import try_lock
from ..training.loading import check_free_disk
from ..version import __version__
from .arguments import SynthesisArguments
from .job import Job, make_job
from .pipelines import device_of_process, native_size
from .sampler import generate_shard
from .shards import ShardFolder
from .sheet import write_contact_sheet

CONTACT_SHEET = "samples.png"
# Seconds between two looks at what the other processes have finished.
POLL_SECONDS = 2.0
# Of the raw pixels: what a PNG of a natural image takes at most, measured generously.
PNG_SHARE, JPEG_SHARE = 0.8, 0.3

logger = logging.get_logger(__name__)


class ShardWorker:
    """
    Makes the shards of a job in one process; the pipeline is loaded once.

    Args:
        job ([`Job`]): what to make, in a folder that is open.
        pipeline: the pipeline of the job's generator, if it is loaded already.
    """

    def __init__(self, job: Job, pipeline: Any = None):
        self.job = job
        self._pipeline = pipeline

    @property
    def pipeline(self) -> Any:
        """Loaded when the first shard is made: a run with nothing to do loads nothing."""
        if self._pipeline is None:
            self._pipeline = self.job.generator.load(device_of_process())
            self._check_disk()
        return self._pipeline

    def _check_disk(self) -> None:
        """Refuse to start what would fill the disk, by an upper estimate."""
        job = self.job
        size = job.settings["image_size"] or native_size(self._pipeline)
        share = PNG_SHARE if job.settings["image_format"] == "png" else JPEG_SHARE
        row_bytes = size * size * 3 * share
        if job.captions.real_images == "keep":
            cells = [job.captions.real_image(index) for index in range(min(8, len(job.captions)))]
            row_bytes += sum(len(cell["bytes"]) for cell in cells if cell) / len(cells)
        rows = sum(len(job.folder.rows(shard)) for shard in job.pending())
        check_free_disk(job.folder.path, int(rows * row_bytes))

    def __call__(self, shard: int, on_batch: Callable[[int], None] = lambda images: None) -> bool:
        """Make a shard, unless it is finished or being made by another process; True if this process made it."""
        job = self.job
        lock = job.folder.lock(shard)
        if lock is None:
            return False
        try:
            if job.folder.shard_path(shard).exists():
                return False
            settings = job.settings | {"gmail_hf_version": __version__}
            rows = job.folder.rows(shard)
            table = generate_shard(self.pipeline, job.captions, rows, settings, job.generator.call, on_batch)
            job.folder.write(shard, table)
        finally:
            lock.release()
        return True


def synthesize(
    args: SynthesisArguments,
    pipeline: Any = None,
    resolve: Callable[[SynthesisArguments], Job] = make_job,
) -> ShardFolder:
    """
    Make the pairs that `args` describe, or what is missing of them.

    Any number of processes can run this on one folder: the ranks of `accelerate launch` and `torchrun`, the tasks of a
    Slurm array, a process started by hand. Each takes shards that no other process is making until none is left. They
    need a shared file system, but no network. The shard of a process that was killed is made by another one.

    Args:
        args ([`SynthesisArguments`]): the run.
        pipeline: the pipeline of `args.generator`, if it is loaded already.
        resolve: makes the job from `args`; Ray workers call it too, so it must be a function that can be pickled.

    Returns:
        [`ShardFolder`]: all shards of `args.shard_range` are finished.

    Raises:
        OSError, ValueError: see [`make_job`]; OSError also where the disk is too small, ValueError where finished
            shards were changed, see [`ShardFolder.check`].
        FileExistsError: `args.output_dir` was made with other settings.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = resolve(args)
    job.open()
    folder, shards, pending = job.folder, job.shards, job.pending()
    if args.verify and rank == 0:
        logger.warning(f"{folder.check(digests=True)} finished shards are as they were written.")
    if not pending:
        if rank == 0:
            logger.warning(f"Nothing to do: all {len(shards)} shards are in '{folder.path}'.")
            _write_sheet(folder)
        return folder
    if rank == 0 and len(pending) < len(shards):
        logger.warning(f"{len(shards) - len(pending)} of {len(shards)} shards are finished; making the others.")
    if args.ray_workers:
        args = replace(args, output_dir=os.path.abspath(args.output_dir))  # workers may have another current folder
        _run_on_ray(partial(resolve, args), job, args.ray_workers)
    else:
        _run_here(ShardWorker(job, pipeline), rank, world_size)
    if rank == 0:
        _write_sheet(folder)
    return folder


def _run_here(worker: ShardWorker, rank: int, world_size: int) -> None:
    job = worker.job
    _ = worker.pipeline  # loaded before the bar starts to count seconds
    with _Progress(job, disable=rank != 0) as progress:
        while pending := job.pending():
            # Each rank begins with its own share, so that ranks seldom try for the same shard.
            pending = pending[rank::world_size] + [s for i, s in enumerate(pending) if i % world_size != rank]
            made = False
            for shard in pending:
                if worker(shard, progress.add):
                    progress.refresh()
                    made = True
                    if shard == 0:
                        _write_sheet(job.folder)
            if not made:
                # Others make what is left; if one of them dies, its lock is released and the shard is made here.
                time.sleep(POLL_SECONDS)
                progress.refresh()


def _run_on_ray(resolve: Callable[[], Job], job: Job, num_workers: int) -> None:
    """Ray gives shards to free workers, and those of a lost node to another one."""
    try:
        import ray.data
    except ImportError as error:
        raise ImportError('The Ray engine needs Ray: pip install "gmail-hf[ray]"') from error
    import torch

    if not ray.is_initialized():
        ray.init(log_to_driver=False)

    class RayWorker(ShardWorker):
        def __init__(self, resolve: Callable[[], Job]):
            super().__init__(resolve())
            self.job.open()  # another node may have another generator under the same name, or other versions

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            for shard in batch["item"].tolist():
                super().__call__(shard)
            return batch

    pending = job.pending()
    made = ray.data.from_items(pending, override_num_blocks=len(pending)).map_batches(
        RayWorker,
        batch_size=1,
        fn_constructor_args=(resolve,),
        concurrency=num_workers,
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    with _Progress(job) as progress:
        for _ in made.iter_batches(batch_size=1):
            progress.refresh()
    left = job.pending()
    if left:
        raise RuntimeError(f"Shards {left[:5]} are being made by processes outside of this run.")


class _Progress:
    """A bar over the images of all processes: own batches at once, others' shards when they are finished."""

    def __init__(self, job: Job, disable: bool = False):
        self.folder, self.shards = job.folder, job.shards
        total = sum(len(self.folder.rows(shard)) for shard in self.shards)
        self.bar = tqdm(
            total=total, initial=self._finished(), unit="image", desc="Generating", smoothing=0, disable=disable
        )

    def _finished(self) -> int:
        return sum(len(self.folder.rows(shard)) for shard in self.folder.finished() & set(self.shards))

    def add(self, images: int) -> None:
        """Images of the shard that this process is making."""
        self.bar.update(images)

    def refresh(self) -> None:
        """Count what is finished; between shards, where this process has nothing in flight."""
        if not self.bar.disable:
            self.bar.update(self._finished() - self.bar.n)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()


def _write_sheet(folder: ShardFolder) -> None:
    path = folder.file(CONTACT_SHEET)
    if path.exists() or not folder.shard_path(0).exists():
        return
    lock = try_lock(folder.path / ".locks" / f"{path.name}.lock")
    if lock is None:  # another process is drawing it
        return
    try:
        write_contact_sheet(folder.shard_path(0), path)
    finally:
        lock.release()
