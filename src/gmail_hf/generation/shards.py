"""A folder of shards with their locks and the settings that they share."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from ..files import try_lock, write_file, writing_to
from .arguments import SPLIT_NAME

MANIFEST = "manifest.json"
# With small row groups, readers such as the Hub's viewer can fetch only a few images.
ROW_GROUP_SIZE = 100


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """List the settings that differ, one line each: `name: theirs -> ours`."""
    names = dict.fromkeys([*theirs, *ours])
    return [
        f"{name}: {theirs.get(name)!r} -> {ours.get(name)!r}" for name in names if theirs.get(name) != ours.get(name)
    ]


def file_of(name: str, split: str) -> str:
    """Return the file name for a split: `manifest.json` for `train`, `manifest-test.json` for `test`."""
    stem, suffix = os.path.splitext(name)
    return name if split == "train" else f"{stem}-{split}{suffix}"


def splits_of(names: Iterable[str]) -> list[str]:
    """Return the splits whose manifests are among the file names, `train` first."""
    stem, suffix = os.path.splitext(MANIFEST)
    matches = [re.fullmatch(rf"{stem}(?:-({SPLIT_NAME}))?{re.escape(suffix)}", name) for name in names]
    return sorted((match[1] or "train" for match in matches if match), key=lambda split: (split != "train", split))


@dataclass
class ShardFolder:
    """
    The shards `data/train-00000-of-00006.parquet` of one split of a folder, and its `manifest.json`.

    The folder may have several splits, each with its own manifest, see [`file_of`].

    Shards are written to a temporary file and then renamed, so an existing shard is complete. Its size and digest are
    in the manifest. The process that generates a shard holds a lock on it, see [`files.try_lock`].

    Args:
        path: the folder.
        num_rows: number of rows in all shards.
        shard_size: number of rows per shard.
        split: the split.
    """

    path: Path
    num_rows: int
    shard_size: int
    split: str = "train"

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_size)

    def rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def shard_path(self, shard: int) -> Path:
        return self.path / "data" / f"{self.split}-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def file(self, name: str) -> Path:
        """Return the path of this split's `manifest.json` or another file."""
        return self.path / file_of(name, self.split)

    def finished(self) -> set[int]:
        """List the finished shards."""
        names = set(os.listdir(self.path / "data")) if (self.path / "data").is_dir() else set()
        return {shard for shard in range(self.num_shards) if self.shard_path(shard).name in names}

    def open(self, settings: dict[str, Any], **more: Any) -> None:
        """
        Make the folder, or check that it was made with the same settings.

        Args:
            settings: all that decides the bytes of the shards, see [`Job`].
            more: further entries of the manifest.

        Raises:
            FileExistsError: the folder holds shards of other settings, and the message shows what differs; or it holds
                files that cannot be loaded as one data set with this split.
            OSError: the folder cannot be created.
            ValueError: a finished shard has another size than when it was written, see [`check`].
        """
        for name in ("data", ".locks"):
            with writing_to(self.path):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        with self._manifest_lock():
            manifest = self.file(MANIFEST)
            if manifest.exists():
                theirs = read_manifest(self.path, self.split)["settings"]
                if theirs != settings:
                    lines = "\n  ".join(differences(theirs, settings))
                    raise FileExistsError(
                        f"'{self.split}' in '{self.path}' was made with other settings (there -> now):\n  {lines}\n"
                        "Use the earlier settings to resume it, or choose another --output_dir."
                    )
                self.check()
                return
            self._check_others(settings)
            fingerprint = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
            content = {"fingerprint": fingerprint, "num_rows": self.num_rows, "num_shards": self.num_shards}
            self._write_manifest(content | {"settings": settings} | more | {"shards": {}})

    def _manifest_lock(self) -> FileLock:
        return FileLock(self.path / ".locks" / "manifest.lock")

    def _write_manifest(self, content: dict[str, Any]) -> None:
        write_file(self.file(MANIFEST), json.dumps(content, indent=2) + "\n")

    def check(self, digests: bool = False) -> int:
        """
        Compare the finished shards with the manifest.

        Args:
            digests: compare digests as well as sizes, which reads all shards.

        Returns:
            Number of matching shards. Shards of the first releases are not in the manifest and not counted.

        Raises:
            ValueError: shards were changed after they were written. The message lists them.
        """
        known = read_manifest(self.path, self.split).get("shards", {})
        paths = [path for path in map(self.shard_path, sorted(self.finished())) if path.name in known]
        changed = []
        for path in paths:
            written, size = known[path.name], path.stat().st_size
            if size != written["size"]:
                changed.append(f"{path.name} has {size} instead of {written['size']} bytes")
            elif digests and digest(path.read_bytes()) != written["blake2b"]:
                changed.append(f"{path.name} has other content")
        if changed:
            raise ValueError(
                f"{len(changed)} shards in '{self.path}' were changed after they were written: "
                f"{'; '.join(changed[:5])}. Delete them and run the same command again to restore them."
            )
        return len(paths)

    def _check_others(self, settings: dict[str, Any]) -> None:
        """Refuse a folder that could not be loaded: with files of no split, or with a split of other columns."""
        others = splits_of(os.listdir(self.path))
        names = [name for name in os.listdir(self.path / "data") if not name.startswith(".")]
        if any(name.partition("-")[0] not in others for name in names):
            raise FileExistsError(f"'{self.path}/data' has files without a {MANIFEST}: choose another --output_dir.")
        for split in others:
            theirs, ours = read_manifest(self.path, split)["settings"].get("real_images"), settings.get("real_images")
            if (theirs == "drop") != (ours == "drop"):
                raise FileExistsError(
                    f"'{self.path}' has '{split}' with real_images '{theirs}', '{self.split}' would have '{ours}'. "
                    f"All splits need the same columns: pass --real_images {theirs}, or choose another --output_dir."
                )

    def lock(self, shard: int) -> FileLock | None:
        """Acquire the lock of an unfinished shard. Return None if another process is generating the shard."""
        return try_lock(self.path / ".locks" / f"{self.split}-{shard:05d}.lock")

    def write(self, shard: int, table: pa.Table) -> None:
        """
        Write a shard atomically.

        Raises:
            OSError: the shard cannot be written, for example on a full disk. Finished shards are unaffected.
        """
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=ROW_GROUP_SIZE)
        content = buffer.getvalue()
        try:
            with self._manifest_lock():  # the manifest first, so that it lists each finished shard
                manifest = read_manifest(self.path, self.split)
                written = {"size": len(content), "blake2b": digest(content)}
                manifest.setdefault("shards", {})[self.shard_path(shard).name] = written
                self._write_manifest(manifest)
            write_file(self.shard_path(shard), content)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}. The finished shards are complete: free disk space and run the same command again",
            ) from error


def digest(content: bytes | pa.Buffer) -> str:
    """Return the 16-byte BLAKE2b digest in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_manifest(folder: str | os.PathLike, split: str = "train") -> dict[str, Any]:
    """
    Read the manifest of a split.

    Raises:
        FileNotFoundError: the folder has no manifest of the split.
    """
    path = Path(folder, file_of(MANIFEST, split))
    if not path.exists():
        raise FileNotFoundError(f"'{folder}' has no {path.name}: it was not written by gmail-hf generate.")
    return json.loads(path.read_text(encoding="utf-8"))


def open_folder(folder: str | os.PathLike) -> list[tuple[ShardFolder, dict[str, Any]]]:
    """Open the splits of an existing folder, each with its manifest. Raises the errors of [`read_manifest`]."""
    opened = []
    for split in splits_of(path.name for path in Path(folder).glob("*")) or ["train"]:
        manifest = read_manifest(folder, split)
        shard_size = manifest["settings"]["shard_size"]
        opened.append((ShardFolder(Path(folder), manifest["num_rows"], shard_size, split), manifest))
    return opened
