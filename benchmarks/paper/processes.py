"""Functions in separate processes that inherit imported libraries, because importing torch takes seconds."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

PRELOADED = ["gmail_hf", "gmail_hf.digits", "gmail_hf.metrics.caption_scores", "transformers.models.clip", "peft"]
# One thread per process. With these settings, glibc keeps the memory freed by a training step for the next step.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
STARTS = threading.Lock()


def call(log: Path, function: Callable, *arguments: Any) -> None:
    """
    Call a function in a process with one thread, write its output to `log`, and wait until it ends.

    Raises:
        RuntimeError: the process failed; the message has the end of the log.
    """
    log.write_text("")
    with STARTS, _environment():
        process = _context().Process(target=_logged, args=(str(log), function, arguments))
        process.start()
    wait([process.sentinel])
    with STARTS:  # starting a process joins all finished ones, which must not happen during this join
        process.join()
    if process.exitcode:
        raise RuntimeError(f"the end of {log}:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def _context() -> BaseContext:
    """Fork from a process that has imported the libraries, or start new processes if forking is not safe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@contextmanager
def _environment() -> Iterator[None]:
    """Set `ENVIRONMENT` while a process starts; existing variables take precedence."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _logged(log: str, function: Callable, arguments: tuple) -> None:
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    function(*arguments)
