"""
Started by test_kills.py: runs a command, kills it at a random moment, and runs it again until it has finished.

    python kills.py KILLS SEED FOLDER '{"generate": [OPTION, ...], "train": [OPTION, ...]}'

Each run is a fork of this process, which has imported what the first one did: kills hit the command's own work. The
output of all runs is in FOLDER. Prints for each command how many runs were killed, finished, resumed, started again.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from gmail_hf.commands import cli
from gmail_hf.commands.bundled import load_pairs
from gmail_hf.training.resuming import last_checkpoint


def forked(work: Callable[[], None], log: Path, seconds: float = float("inf")) -> int | None:
    """The exit code of some work, or None if it was killed after so many seconds."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(log, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            work()
            log.with_suffix(".modules").write_text("\n".join(sys.modules))
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def run(argv: list[str], log: Path, seconds: float = float("inf")) -> int | None:
    return forked(partial(cli.main, argv), log, seconds)


def contents(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What a finished run must have in common with one that was never killed."""
    files = [path for kind in kinds for path in folder.glob(kind)]
    return {str(path.relative_to(folder)): content(path) for path in sorted(files)}


def content(path: Path) -> Any:
    """A file's bytes; for safetensors, whose header lists its entries in any order, the header and the rest."""
    found = path.read_bytes()
    if path.suffix != ".safetensors":
        return found
    end = 8 + int.from_bytes(found[:8], "little")
    return json.loads(found[8:end]), found[end:]


def check_shards(folder: Path, whole: dict[str, Any]) -> None:
    """What a killed generation leaves can be loaded and is a part of the whole."""
    shards = contents(folder, ("data/*.parquet",))
    assert all(whole[name] == content for name, content in shards.items())
    if shards:
        rows = sum(pq.read_metadata(folder / name).num_rows for name in shards)
        assert len(load_pairs(str(folder))) == rows


def leftovers(*folders: Path) -> list[str]:
    """Temporary files and folders; the locks stay."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return [str(path) for path in paths if path.name.endswith(".part") or path.name.startswith("tmp")]


def main(command: str, kills: int, seed: int, folder: Path, options: list[str]) -> dict[str, int]:
    chance, log, folder = random.Random(seed), folder / f"{command}.txt", folder / command
    kinds = ("data/*.parquet",) if command == "generate" else ("*.safetensors", "gen/*.safetensors")
    assert run([command, *options, "--output_dir", str(folder / "whole")], log) == 0, log.read_text()
    whole = contents(folder / "whole", kinds)
    assert whole
    for name in log.with_suffix(".modules").read_text().split():
        with suppress(Exception):  # those that are imported under another name
            importlib.import_module(name)
    start = time.monotonic()
    assert run([command, *options, "--output_dir", str(folder / "again")], log) == 0
    duration = time.monotonic() - start
    counts = {"killed": 0, "finished": 0, "resumed": 0, "started_again": 0}
    while counts["killed"] < kills:
        output, fresh = folder / f"out-{counts['finished']}", True
        while True:
            resume = command == "train" and not fresh and last_checkpoint(output) is not None
            argv = [command, *options, "--output_dir", str(output), *["--resume_from_checkpoint=true"] * resume]
            counts["resumed"] += resume or (command == "generate" and not fresh)
            counts["started_again"] += command == "train" and not fresh and not resume
            left = counts["killed"] < kills
            code = run(argv, log, chance.uniform(0, 1.1 * duration) if left else float("inf"))
            if code is not None:
                break
            counts["killed"] += 1
            fresh = False
            if command == "generate":
                # In a process too: it starts threads, and this one must not have any when it forks.
                assert forked(partial(check_shards, output, whole), log) == 0, log.read_text()[-5000:]
        assert code == 0, log.read_text()[-5000:]
        assert contents(output, kinds) == whole
        assert not leftovers(output, Path(datasets.config.HF_DATASETS_CACHE, "gmail_hf"))
        counts["finished"] += 1
    return counts


if __name__ == "__main__":
    kills, seed, folder, commands = sys.argv[1:]
    counts = {
        command: main(command, int(kills), int(seed), Path(folder), options)
        for command, options in json.loads(commands).items()
    }
    print(json.dumps(counts))
