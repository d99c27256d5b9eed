"""Scripts in processes of their own that need not import torch and transformers again, which takes seconds."""

import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

PRELOADED = ["gmail_hf", "gmail_hf.digits", "gmail_hf.evaluation.captioning", "transformers.models.clip", "peft"]
# glibc returns what a training step frees and faults it in again at the next; so told, it keeps it.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}


SERVER = threading.Lock()


def start_server() -> BaseContext:
    """Start what processes are forked from, once; where a system cannot fork, they are fresh."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    with SERVER:
        context.set_forkserver_preload(PRELOADED)
        before = {name: os.environ.get(name) for name in KEEP_FREED_MEMORY}
        os.environ.update(KEEP_FREED_MEMORY)  # which is read when a process starts
        try:
            forkserver.ensure_running()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def call(log: Path, function: Callable, *arguments: Any) -> None:
    """
    Call a function in a process of one thread, all that it prints in `log`, and wait for its end.

    Raises:
        RuntimeError: it failed; the message has the end of the log.
    """
    process = start_server().Process(target=_logged, args=(str(log), function, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the end of {log}:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def run_script(script: str, *arguments: str) -> None:
    """What `python SCRIPT ARGUMENT ...` does."""
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _logged(log: str, function: Callable, arguments: tuple) -> None:
    import torch

    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    function(*arguments)
