"""
How the benchmarks measure: sides take turns, peaks of memory are taken in separate processes, rows may have an aim.

As a script it runs one job in a separate process and prints its result: `python measuring.py MODULE:FUNCTION
ARGUMENTS`, with the arguments in JSON. It imports only the standard library, so that a peer's interpreter can run it.
"""

import importlib
import json
import operator
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux
COMPARISONS = {">=": operator.ge, "<=": operator.le}


class MissingPeer(Exception):
    """A side cannot run: a peer is not installed (the message has the remedy) or does not fit in memory."""


@dataclass(frozen=True)
class Settings:
    """The settings of all benchmarks. Each benchmark chooses its sizes by `quick` and `device`."""

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    threads: int = 1
    workers: int = 0
    quick: bool = False
    size: str | None = None
    batch: int | None = None
    peer_python: str = sys.executable

    def choose(self, quick: Any, cpu: Any, cuda: Any) -> Any:
        """Choose a size by the kind of run."""
        return quick if self.quick else cuda if self.device == "cuda" else cpu


def take_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The values of each side by round. Every other round is in reverse order, so a drift affects all sides alike."""
    values: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            values[side].append(sides[side]())
    return values


def row(
    benchmark: str,
    measured: str,
    against: str,
    unit: str,
    ours: list[float],
    theirs: list[float],
    aim: str | None = None,
    note: str = "",
) -> dict[str, Any]:
    """
    One row of the table: medians, and the ratio ours / theirs with its spread over the rounds.

    `aim` is a bound for the median ratio, such as ">= 1.5".
    """
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    line = {"benchmark": benchmark, "measured": measured, "against": against, "unit": unit}
    line |= {
        "ours": statistics.median(ours),
        "theirs": statistics.median(theirs),
        "rounds": {"ours": ours, "theirs": theirs},
    }
    line |= {"ratio": ratio, "spread": [min(ratios), max(ratios)], "aim": aim, "note": note}
    if aim is not None:
        sign, bound = aim.split()
        line["met"] = COMPARISONS[sign](ratio, float(bound))
    return line


def missing(benchmark: str, measured: str, against: str, reason: str) -> dict[str, Any]:
    """The row of a peer that could not run."""
    return {"benchmark": benchmark, "measured": measured, "against": against, "missing": reason}


def growth(benchmark: str, measured: str, points: dict[int, float], unit: str, note: str = "") -> dict[str, Any]:
    """The growth from the first to the last size, against the growth of the size, with a margin of 10 % for noise."""
    sizes = list(points)
    grown, larger = points[sizes[-1]] / points[sizes[0]], sizes[-1] / sizes[0]
    line = row(
        benchmark, f"{measured}, {sizes[0]:,} to {sizes[-1]:,}", "linear", "times", [grown], [larger], "<= 1.1", note
    )
    return line | {"points": {str(size): point for size, point in points.items()}, "points_unit": unit}


def alone(
    job: str,
    settings: Settings,
    python: str = sys.executable,
    launcher: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    **arguments: Any,
) -> Any:
    """
    Call a function of a module here in a separate process, with `settings` as its first argument.

    Raises:
        MissingPeer: the function raised it, or there was not enough memory.
        RuntimeError: the process failed; the message has the end of its error output.
    """
    call = json.dumps({"settings": asdict(settings), "arguments": arguments})
    done = subprocess.run(
        [python, *launcher, __file__, job, call],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    if "OutOfMemoryError" in done.stderr:
        raise MissingPeer("out of memory")
    if done.returncode == -signal.SIGKILL:
        raise MissingPeer("killed, which the system does if it runs out of memory")
    if done.returncode:
        raise RuntimeError(f"{job} failed in a separate process:\n{done.stderr[-3000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "missing" in answer:
        raise MissingPeer(answer["missing"])
    return answer["result"]


def forget_peak(settings: Settings) -> None:
    """Reset the peak to the current memory, if the system supports it."""
    if settings.device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def peak_mb(settings: Settings) -> float:
    """
    The peak memory of this process in MB: what torch allocated on the GPU, otherwise resident memory.

    On Linux it is VmHWM, because ru_maxrss of getrusage is there at least that of the parent process.
    """
    if settings.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    if CLEAR_REFS.exists():
        return status_mb("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # in bytes on macOS, elsewhere in kibibytes


def status_mb(key: str) -> float:
    """VmRSS or VmHWM of this process on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def imports(settings: Settings) -> float:
    """The peak of a process with the imports of all sides, the baseline for their peaks."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers

    import gmail_hf  # noqa: F401

    transformers.CLIPModel  # noqa: B018  # transformers imports its models on first access
    torch.randn(64, 64, device=settings.device) @ torch.randn(64, 64, device=settings.device)
    return peak_mb(settings)


class Clock:
    """Seconds between two ticks. On a GPU, a tick waits until all work is done."""

    def __init__(self, settings: Settings):
        self.cuda = settings.device == "cuda"
        self.ticks: list[float] = []

    def tick(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())

    def seconds(self, skip: int = 1) -> float:
        """Mean time between two ticks, without the first `skip` intervals."""
        return (self.ticks[-1] - self.ticks[skip - 1]) / (len(self.ticks) - skip)


def timed(call: Callable[[], Any], settings: Settings = Settings()) -> float:
    """Seconds of a call."""
    clock = Clock(settings)
    clock.tick()
    call()
    clock.tick()
    return clock.seconds()


def main() -> None:
    job, call = sys.argv[1:]
    module, function = job.split(":")
    call = json.loads(call)
    try:
        answer = {
            "result": getattr(importlib.import_module(module), function)(
                Settings(**call["settings"]), **call["arguments"]
            )
        }
    except MissingPeer as reason:
        answer = {"missing": str(reason)}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(answer))


if __name__ == "__main__":
    # `import measuring` in a job must find this module, otherwise its MissingPeer is another class.
    sys.modules["measuring"] = sys.modules["__main__"]
    sys.path.insert(0, str(Path(__file__).parent))
    main()
