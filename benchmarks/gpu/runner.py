"""
Run the parts of parts.py in sequence, the most important first, and collect their measurements.

Each part is a process with a time limit. summary.json and summary.md are written after every line, so measurements are
kept if a part fails or runs out of time. log.txt has the output of the parts. Only the standard library is imported.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("parts.py")
# Seconds of each part, in total 9 minutes with the installation. Unused time is added to the next parts.
SECONDS = {"rates": 40, "tests": 100, "stage1": 120, "bases": 50, "vlm": 90, "generation": 85, "caching": 40}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="Folder for the results.")
    parser.add_argument("--only", nargs="+", choices=SECONDS, help="Only these parts, after `rates`.")
    parser.add_argument(
        "--tiny", action="store_true", help="Small versions of all parts, on a CPU if there is no GPU."
    )
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in SECONDS if args.only is None or part in ("rates", *args.only)]
    summary: dict[str, Any] = {"tiny": args.tiny, "environment": {}, "rates": {}, "parts": {}}
    deadline = start = time.monotonic()
    with open(args.output / "log.txt", "w") as log:
        for part in chosen:
            deadline += SECONDS[part]
            run(part, summary, args, deadline, log)
            summary["seconds"] = round(time.monotonic() - start, 1)
            write(summary, args.output)
            print(f"{part}: {summary['parts'][part]['status']}, {summary['parts'][part]['seconds']} s", flush=True)
    print(f"\n{markdown(summary)}")
    return summary


def run(part: str, summary: dict[str, Any], args: argparse.Namespace, deadline: float, log: Any) -> None:
    """Run a part until `deadline`, and add its output to `summary`."""
    began = time.monotonic()
    lines: list[dict[str, Any]] = []
    summary["parts"][part] = {"status": "running", "seconds": 0.0, "lines": lines}
    command = [sys.executable, str(SCRIPT), part, json.dumps(summary["rates"])]
    log.write(f"== {part}\n")
    log.flush()
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if args.tiny else {}
    process = subprocess.Popen(
        [*command, *(["--tiny"] if args.tiny else [])],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, **threads},
        start_new_session=True,
    )
    timer = threading.Timer(max(deadline - began, 1), stop, [process])
    timer.start()
    try:
        for text in process.stdout:
            try:
                line = json.loads(text)
            except ValueError:  # printed by a library
                line = None
            if not isinstance(line, dict):
                log.write(text)
                continue
            summary["environment"] |= line.pop("environment", {})
            summary["rates"] |= line.pop("rates", {})
            lines.append(line)
            print(f"{part}: {' | '.join(cells(line))}", flush=True)
            write(summary, args.output)
        status = process.wait()
    finally:
        out_of_time = not timer.is_alive()
        timer.cancel()
        stop(process)  # also what it left running
    if status:
        done = "out of time" if out_of_time else f"failed with exit code {status}, see log.txt"
    else:
        done = "finished, with failures" if any("failed" in line for line in lines) else "finished"
    summary["parts"][part] |= {"status": done, "seconds": round(time.monotonic() - began, 1)}


def stop(process: subprocess.Popen) -> None:
    """End a part and the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def write(summary: dict[str, Any], output: Path) -> None:
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output / "summary.md").write_text(markdown(summary))


def markdown(summary: dict[str, Any]) -> str:
    """The summary as tables, one for each part."""
    environment = summary["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items() if version)
    rates = ", ".join(f"{value / 1e12:.4g} T{name}/s" for name, value in summary["rates"].items())
    text = [
        f"# {'A rehearsal in small' if summary['tiny'] else 'A GPU in one call'}\n",
        f"{environment.get('date')}, commit {environment.get('git_commit')}"
        f"{' with uncommitted changes' if environment.get('uncommitted_changes') else ''}.  ",
        f"{environment.get('machine')}; Python {environment.get('python')}, {packages}.  ",
        f"Measured: {rates}. Floors are operations / the rate of a large matrix product, and bytes / the rate of a",
        "large copy, for weights, optimizer and images, without activations. Share: the larger floor / the seconds.\n",
    ]
    for part, found in summary["parts"].items():
        text += [f"## {part}: {found['status']}, {found['seconds']} s\n"]
        text += ["| line | speed | seconds (spread) | floor by operations | by bytes | share | peak memory | note |"]
        text += ["|---|---:|---:|---:|---:|---:|---:|---|"]
        text += [f"| {' | '.join(cells(line))} |" for line in found["lines"]] + [""]
    return "\n".join(text)


def cells(line: dict[str, Any]) -> list[str]:
    """A line of a table; what was not measured is a dash."""

    def number(key: str, form: str) -> str:
        return form.format(line[key]) if line.get(key) is not None else "–"

    seconds = number("seconds", "{:.4g} s")
    if "spread" in line:
        seconds += f" ({line['spread'][0]:.4g} to {line['spread'][1]:.4g})"
    reason = {"failed": "FAILED: ", "skipped": "skipped: "}
    note = next((prefix + line[key] for key, prefix in reason.items() if key in line), line.get("note", ""))
    return [
        line["name"],
        f"{line['speed']:.4g} {line['unit']}/s" if "speed" in line else "–",
        seconds,
        number("floor_operations", "{:.4g} s"),
        number("floor_bytes", "{:.4g} s"),
        number("share", "{:.0%}"),
        number("peak_mb", "{:,.0f} MB"),
        " ".join(note.replace("|", "/").split())[:300],
    ]


if __name__ == "__main__":
    failed = [part for part, found in main()["parts"].items() if found["status"] != "finished"]
    sys.exit(f"Not finished: {', '.join(failed)}" if failed else 0)
