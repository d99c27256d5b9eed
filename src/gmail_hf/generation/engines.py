"""Generates all shards in one process, under accelerate or torchrun, or in Slurm arrays."""

import os
import time
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


def synthesize(args: SynthesisArguments, pipeline: Any = None, job: Job | None = None) -> ShardFolder:
    """
    Generate the pairs of `args` that do not exist yet.

    Any number of processes can run this on one folder: the ranks of `accelerate launch` and `torchrun`, the tasks of a
    Slurm array, or a process started by hand. Each process generates shards that no other process has locked, until
    all are finished. The processes need a shared file system, but no network. If a process is killed, another one
    generates its shard.

    Args:
        args ([`SynthesisArguments`]): settings of the run.
        pipeline: the pipeline of `args.generator`, if it is already loaded.
        job: the job of `args`, by default the result of [`make_job`].

    Returns:
        [`ShardFolder`] in which all shards of `args.shard_range` are finished.

    Raises:
        OSError, ValueError: see [`make_job`]. Also an OSError if the disk is too small, and a ValueError if finished
            shards were changed, see [`ShardFolder.check`].
        FileExistsError: `args.output_dir` was generated with other settings.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = make_job(args) if job is None else job
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
    pipeline = job.generator.load(device_of_process()) if pipeline is None else pipeline
    _check_disk(job, pipeline)
    with _Progress(job, disable=rank != 0) as progress:
        while pending := job.pending():
            # Each rank starts with its own share, so that ranks rarely try the same shard.
            pending = pending[rank::world_size] + [s for i, s in enumerate(pending) if i % world_size != rank]
            made = [generate_if_free(job, pipeline, shard, progress) for shard in pending]
            if not any(made):
                # Other processes have the remaining shards. If one dies, its lock is released: try its shard again.
                time.sleep(POLL_SECONDS)
                progress.refresh()
    if rank == 0:
        _write_sheet(folder)
    return folder


def generate_if_free(job: Job, pipeline: Any, shard: int, progress: "_Progress") -> bool:
    """Generate a shard unless it is finished or locked by another process. Return whether this process did."""
    lock = job.folder.lock(shard)
    if lock is None:
        return False
    try:
        if job.folder.shard_path(shard).exists():
            return False
        settings = job.settings | {"gmail_hf_version": __version__}
        rows, call = job.folder.rows(shard), job.generator.call
        job.folder.write(shard, generate_shard(pipeline, job.captions, rows, settings, call, progress.add))
    finally:
        lock.release()
    progress.refresh()
    if shard == 0:
        _write_sheet(job.folder)
    return True


def _check_disk(job: Job, pipeline: Any) -> None:
    """Refuse to start a run that would fill the disk, by an upper estimate."""
    size = job.settings["image_size"] or native_size(pipeline)
    share = PNG_SHARE if job.settings["image_format"] == "png" else JPEG_SHARE
    row_bytes = size * size * 3 * share
    if job.captions.real_images == "keep":
        cells = [job.captions.real_image(index) for index in range(min(8, len(job.captions)))]
        row_bytes += sum(len(cell["bytes"]) for cell in cells if cell) / len(cells)
    rows = sum(len(job.folder.rows(shard)) for shard in job.pending())
    check_free_disk(job.folder.path, int(rows * row_bytes))


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
