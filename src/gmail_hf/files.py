"""Files and folders that exist whole or not at all, and locks for those that one process may write at a time."""

import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# Uploads of a Trainer leave out names that start with "_".
FOLDER_LOCK = "_lock"


def write_file(path: str | os.PathLike, content: Any) -> None:
    """Write text (as UTF-8) or bytes to a file, see [`replacing`]."""
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON object per line, see [`replacing`]."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    A temporary file to write, which replaces `path` at the end of the block.

    A reader finds the old file or the new one, also after a kill or a power failure. The temporary file is in the same
    folder. Its name starts with ".", so that no pattern for data files matches it, and is random and new, so that no
    symbolic link can be in its place. After an error it is deleted; what a killed process left is deleted by the next
    one that writes `path`.

    Raises:
        OSError: the file cannot be written, because the disk is full for instance.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(partial, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield partial
        partial.chmod(mode)  # safetensors lets nobody else read its files
        _sync(partial)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno is not None and error.filename in (None, str(partial)):
            raise OSError(error.errno, f"'{path}' could not be written ({error.strerror})") from error
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | os.PathLike, wait: bool = False) -> Iterator[Path]:
    """
    A path to make a folder at, which is renamed to `path` at the end of the block.

    Its parent folder may hold temporary files; it is deleted at the end. What a killed process left is deleted by the
    next one that makes `path`.

    Args:
        path: the folder, which does not exist.
        wait: wait for another process that is making it.

    Raises:
        FileExistsError: `path` exists, or another process is making it.
    """
    path = Path(path).absolute()
    work = path.with_name(f".{path.name}.part")
    if work.is_symlink():
        work.unlink()
    work.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(work, wait)
    try:
        if path.exists():
            raise FileExistsError(f"'{path}' exists already.")
        _empty(work)
        yield work / path.name
        sync_folder(work / path.name)
        os.rename(work / path.name, path)
    finally:
        _empty(work)
        unlock_folder(lock)


def try_lock(path: str | os.PathLike, wait: bool = False, again: bool = False) -> FileLock | None:
    """
    The lock of a file `path`, held until it is released; None if another process holds it.

    The operating system releases the lock of a process that dies, also that of another machine if the file system's
    locks span machines (NFS, Lustre, GPFS).

    Args:
        path: the lock's own file, which stays.
        wait: wait for the other process.
        again: the process that holds the lock may acquire it again, and releases it as often.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=again)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    return lock


def lock_folder(folder: str | os.PathLike, wait: bool = False) -> FileLock:
    """
    The lock of a folder, which the same process may acquire again, see [`try_lock`]; [`unlock_folder`] releases it.

    Raises:
        FileExistsError: another process writes the folder.
    """
    lock = try_lock(Path(folder).absolute() / FOLDER_LOCK, wait, again=True)
    if lock is None:
        raise FileExistsError(
            f"Another process is writing '{folder}': wait until it has finished, or choose another folder."
        )
    return lock


def unlock_folder(lock: FileLock) -> None:
    """Release the lock of a folder; delete its file, and the folder if there is nothing else in it."""
    if lock.lock_counter == 1:
        Path(lock.lock_file).unlink(missing_ok=True)
        with suppress(OSError):
            Path(lock.lock_file).parent.rmdir()
    lock.release()


def sync_folder(folder: str | os.PathLike) -> None:
    """Wait until all files of a folder are on the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            _sync(path)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != FOLDER_LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
