"""Generates all shards in one process, under accelerate or torchrun, in Slurm arrays, or on Ray."""

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
# Seconds between checks for shards that other processes have finished.
POLL_SECONDS = 2.0
# Upper estimates of the size of an encoded natural image, as shares of its raw pixels.
PNG_SHARE, JPEG_SHARE = 0.8, 0.3

logger = logging.get_logger(__name__)


class ShardWorker:
    """
    Generates the shards of a job in one process. The pipeline is loaded once.

    Args:
        job ([`Job`]): the job, whose folder is open.
        pipeline: the pipeline of the job's generator, if it is already loaded.
    """

    def __init__(self, job: Job, pipeline: Any = None):
        self.job = job
        self._pipeline = pipeline

    @property
    def pipeline(self) -> Any:
        """The pipeline, loaded on first use, so that a run with nothing to do loads nothing."""
        if self._pipeline is None:
            self._pipeline = self.job.generator.load(device_of_process())
            self._check_disk()
        return self._pipeline

    def _check_disk(self) -> None:
        """Refuse to start a run that would fill the disk, by an upper estimate."""
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
        """Generate a shard unless it is finished or locked by another process. Return whether this process did."""
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
    Generate the pairs of `args` that do not exist yet.

    Any number of processes can run this on one folder: the ranks of `accelerate launch` and `torchrun`, the tasks of a
    Slurm array, or a process started by hand. Each process generates shards that no other process has locked, until
    all are finished. The processes need a shared file system, but no network. If a process is killed, another one
    generates its shard.

    Args:
        args ([`SynthesisArguments`]): settings of the run.
        pipeline: the pipeline of `args.generator`, if it is already loaded.
        resolve: creates the job from `args`. Ray workers also call it, so it must be a function that can be pickled.

    Returns:
        [`ShardFolder`] in which all shards of `args.shard_range` are finished.

    Raises:
        OSError, ValueError: see [`make_job`]. Also an OSError if the disk is too small, and a ValueError if finished
            shards were changed, see [`ShardFolder.check`].
        FileExistsError: `args.output_dir` was generated with other settings.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = resolve(args)
    job.open()
    folder, shards, pending = job.folder, job.shards, job.pending()
    if args.verify and rank == 0:
        logger.warning(f"{folder.check(digests=True)} finished shards are unchanged.")
    if not pending:
        if rank == 0:
            logger.warning(f"Nothing to do: all {len(shards)} shards are in '{folder.path}'.")
            _write_sheet(folder)
        return folder
    if rank == 0 and len(pending) < len(shards):
        logger.warning(f"{len(shards) - len(pending)} of {len(shards)} shards are finished; generating the others.")
    if args.ray_workers:
        args = replace(args, output_dir=os.path.abspath(args.output_dir))  # workers may run in another folder
        _run_on_ray(partial(resolve, args), job, args.ray_workers)
    else:
        _run_here(ShardWorker(job, pipeline), rank, world_size)
    if rank == 0:
        _write_sheet(folder)
    return folder


def _run_here(worker: ShardWorker, rank: int, world_size: int) -> None:
    job = worker.job
    _ = worker.pipeline  # load before the progress bar starts its timer
    with _Progress(job, disable=rank != 0) as progress:
        while pending := job.pending():
            # Each rank starts with its own share, so that ranks rarely try the same shard.
            pending = pending[rank::world_size] + [s for i, s in enumerate(pending) if i % world_size != rank]
            made = False
            for shard in pending:
                if worker(shard, progress.add):
                    progress.refresh()
                    made = True
                    if shard == 0:
                        _write_sheet(job.folder)
            if not made:
                # Other processes have the remaining shards. If one dies, its lock is released: try its shard again.
                time.sleep(POLL_SECONDS)
                progress.refresh()


def _run_on_ray(resolve: Callable[[], Job], job: Job, num_workers: int) -> None:
    """Let Ray assign shards to free workers, and shards of a lost node to another node."""
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
            self.job.open()  # another node may have a different generator with the same name

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
        raise RuntimeError(f"Processes outside this run are generating shards {left[:5]}: wait for them to finish.")


class _Progress:
    """A progress bar for the images of all processes: own batches, and finished shards of other processes."""

    def __init__(self, job: Job, disable: bool = False):
        self.folder, self.shards = job.folder, job.shards
        total = sum(len(self.folder.rows(shard)) for shard in self.shards)
        self.bar = tqdm(
            total=total, initial=self._finished(), unit="image", desc="Generating", smoothing=0, disable=disable
        )

    def _finished(self) -> int:
        return sum(len(self.folder.rows(shard)) for shard in self.folder.finished() & set(self.shards))

    def add(self, images: int) -> None:
        """Count images of this process's current shard."""
        self.bar.update(images)

    def refresh(self) -> None:
        """Count the finished shards. Call it between shards only."""
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
    if lock is None:  # another process is writing it
        return
    try:
        write_contact_sheet(folder.shard_path(0), path)
    finally:
        lock.release()
