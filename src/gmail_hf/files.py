"""Atomic writes of files and folders, and locks for those that only one process may write at a time."""

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

# The Trainer does not upload names that start with "_".
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
    Write a temporary file, which replaces `path` at the end of the block.

    Readers see either the old or the new file, even after a kill or a power failure. The temporary file is in the same
    folder. Its name starts with ".", so patterns for data files do not match it, and is random, so it cannot be a
    symbolic link. It is deleted after an error. If the process is killed, the next one that writes `path` deletes it.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with open(partial, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield partial
        partial.chmod(mode)  # safetensors writes files that only their owner can read
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
    Create a folder under a temporary path, which is renamed to `path` at the end of the block.

    The parent of the temporary path may hold temporary files, and is deleted at the end. If the process is killed, the
    next one that creates `path` deletes it.

    Args:
        path: the folder, which must not exist.
        wait: wait for another process that is creating it.

    Raises:
        FileExistsError: `path` exists, or another process is creating it.
    """
    path = Path(path).absolute()
    work = path.with_name(f".{path.name}.part")
    if work.is_symlink():
        work.unlink()
    work.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(work, wait)
    try:
        if path.exists():
            raise FileExistsError(f"'{path}' already exists.")
        _empty(work)
        yield work / path.name
        sync_folder(work / path.name)
        os.rename(work / path.name, path)
    finally:
        _empty(work)
        unlock_folder(lock)


def try_lock(path: str | os.PathLike, wait: bool = False, again: bool = False) -> FileLock | None:
    """
    Acquire the lock file `path`; return None if another process holds it.

    The operating system releases the lock of a process that dies. This includes processes on other machines if the
    locks of the file system span machines (NFS, Lustre, GPFS).

    Args:
        path: the lock file, which is not deleted.
        wait: wait for the other process.
        again: the process that holds the lock may acquire it again, and has to release it as often.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=again)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    return lock


@contextmanager
def writing_to(folder: str | os.PathLike) -> Iterator[None]:
    """Name the folder and the remedy in errors of the file system."""
    try:
        yield
    except OSError as error:
        problem = f"'{folder}' is not a folder that can be written to ({error.strerror})"
        raise type(error)(f"{problem}. Choose another folder.") from error


def lock_folder(folder: str | os.PathLike, wait: bool = False) -> FileLock:
    """
    Acquire the lock of a folder. The same process may acquire it again. [`unlock_folder`] releases it.

    Raises:
        FileExistsError: another process is writing the folder.
        OSError: the folder cannot be created or written to.
    """
    with writing_to(folder):
        lock = try_lock(Path(folder).absolute() / FOLDER_LOCK, wait, again=True)
    if lock is None:
        raise FileExistsError(
            f"Another process is writing '{folder}'. Wait until it has finished, or choose another folder."
        )
    return lock


def unlock_folder(lock: FileLock) -> None:
    """Release the lock of a folder. Delete its file, and the folder if it is otherwise empty."""
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
