"""A folder of shards: what is finished, who may write what, and the settings that all of it was made with."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from .arguments import SynthesisArguments
from .captions import Captions
from .pipelines import Generator

MANIFEST = "manifest.json"
# Small row groups let readers, the Hub's viewer among them, fetch few images at a time.
ROW_GROUP_SIZE = 100
# Arguments that decide the bytes of the shards as they are; the others are resolved, or say where, who and how fast.
OWN_SETTINGS = ("images_per_caption", "image_size", "compile", "batch_size", "seed", "shard_size", "image_format")


def settings_of(args: SynthesisArguments, generator: Generator, captions: Captions) -> dict[str, Any]:
    """All that decides the bytes of the shards."""
    own = {name: value for name, value in asdict(args).items() if name in OWN_SETTINGS}
    return own | {
        "captions": captions.fingerprint(),
        "num_captions": len(captions),
        "real_images": captions.real_images,
        "safety_policy": args.safety_policy,
        "negative_prompt": args.negative_prompt,
        "generator": generator.name,
        "generator_revision": generator.revision,
        "pipeline": generator.pipeline_class.__name__,
        "scheduler": generator.scheduler,
        "dtype": generator.dtype,
        "num_inference_steps": generator.call["num_inference_steps"],
        "guidance_scale": generator.guidance_scale,
    }


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """One line for each setting that differs: `name: theirs -> ours`."""
    names = dict.fromkeys([*theirs, *ours])
    return [
        f"{name}: {theirs.get(name)!r} -> {ours.get(name)!r}" for name in names if theirs.get(name) != ours.get(name)
    ]


@dataclass
class ShardFolder:
    """
    The shards `data/train-00000-of-00006.parquet` of a folder, and its `manifest.json`.

    A shard is written beside its name and renamed, so a file that is there is finished. Whoever makes a shard holds
    a file lock on it: the operating system drops the lock of a process that dies, however it dies, on this machine
    or, where the file system's locks span machines (NFS, Lustre, GPFS), on another one.

    Args:
        path: the folder.
        num_rows: rows of all shards.
        shard_size: rows of a shard.
    """

    path: Path
    num_rows: int
    shard_size: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_size)

    def rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def shard_path(self, shard: int) -> Path:
        return self.path / "data" / f"train-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def finished(self) -> set[int]:
        """Shards that are there; one listing of the folder, however many."""
        names = set(os.listdir(self.path / "data")) if (self.path / "data").is_dir() else set()
        return {shard for shard in range(self.num_shards) if self.shard_path(shard).name in names}

    def open(self, settings: dict[str, Any], **more: Any) -> None:
        """
        Make the folder, or check that it was made with the same settings.

        Args:
            settings: see [`settings_of`].
            more: what the manifest tells besides.

        Raises:
            FileExistsError: the folder holds shards of other settings; the message shows what differs.
        """
        for name in ("data", ".locks"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".locks" / "manifest.lock"):
            manifest = self.path / MANIFEST
            if manifest.exists():
                theirs = read_manifest(self.path)["settings"]
                if theirs != settings:
                    lines = "\n  ".join(differences(theirs, settings))
                    raise FileExistsError(
                        f"'{self.path}' was made with other settings (there -> now):\n  {lines}\n"
                        "Give the settings of before to go on with it, or choose another --output_dir."
                    )
                return
            if self.finished() or any((self.path / "data").iterdir()):
                raise FileExistsError(
                    f"'{self.path}/data' holds files without a {MANIFEST}: choose another --output_dir."
                )
            fingerprint = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
            content = {"fingerprint": fingerprint, "num_rows": self.num_rows, "num_shards": self.num_shards}
            content |= {"settings": settings} | more
            replace_file(manifest, (json.dumps(content, indent=2) + "\n").encode())

    def lock(self, shard: int) -> FileLock | None:
        """The lock of an unfinished shard, held until released; None if another process makes the shard."""
        lock = FileLock(self.path / ".locks" / f"{shard:05d}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def write(self, shard: int, table: pa.Table) -> None:
        """
        Write a shard so that it is there as a whole or not at all.

        Raises:
            OSError: it cannot be written, because the disk is full for instance. Finished shards are as before.
        """
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=ROW_GROUP_SIZE)
        try:
            replace_file(self.shard_path(shard), buffer.getvalue())
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.shard_path(shard)} could not be written ({error.strerror}). The finished shards are whole: "
                "give it room and run the same command again",
            ) from error


def replace_file(path: Path, content: bytes | pa.Buffer) -> None:
    """Write beside and rename, so that nobody, even after a power cut, finds half a file."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """
    The manifest of a folder of shards.

    Raises:
        FileNotFoundError: the folder has none.
    """
    path = Path(folder, MANIFEST)
    if not path.exists():
        raise FileNotFoundError(f"'{folder}' holds no {MANIFEST}: it was not made by examples/generate_dataset.py.")
    return json.loads(path.read_text(encoding="utf-8"))


def open_folder(folder: str | os.PathLike) -> tuple[ShardFolder, dict[str, Any]]:
    """A folder of shards that is there already, and its manifest; errors as in [`read_manifest`]."""
    manifest = read_manifest(folder)
    return ShardFolder(Path(folder), manifest["num_rows"], manifest["settings"]["shard_size"]), manifest
