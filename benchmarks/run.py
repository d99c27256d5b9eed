"""
Measure speed and memory of gmail-hf against the common alternatives, in one run.

    python benchmarks/run.py                    # all, one to two hours on one thread
    python benchmarks/run.py --quick            # all with small sizes, as a check
    python benchmarks/run.py --only step infer

It prints a table of ratios, writes results/<date>-cpu.json (or -cuda.json) with machine, versions and commit, and
draws a bar chart next to it. The sides of a ratio take turns. The table has medians and the spread over the rounds.
Models have real sizes and random weights, so nothing is downloaded. If a peer is not installed, the table shows how to
install it, and all other benchmarks run.
"""

import argparse
import importlib
import json
import os
import sys
import textwrap
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# Benchmarks by name, with the module that has a function of that name.
BENCHMARKS = {
    "step": "training",
    "memory": "training",
    "bases": "bases",
    "cached": "caching",
    "infer": "inference",
    "imports": "cli",
    "embed": "cli",
    "diagnose": "cli",
    "load": "load",
    "stage2": "stage2",
    "retrieval": "evaluation",
    "generate": "generation",
    "scale": "scaling",
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=f"Any of {', '.join(BENCHMARKS)}."
    )
    parser.add_argument("--quick", action="store_true", help="Small sizes and few rounds.")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Defaults to cuda if available.")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="Defaults to float32 on CPU, bfloat16 on CUDA."
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile for training and inference, all sides.")
    parser.add_argument("--batch", type=int, help="Batch size of step and memory.")
    parser.add_argument("--size", help="Model of step, memory and infer, a key of subjects.SIZES.")
    parser.add_argument(
        "--threads", type=int, default=1, help="Threads per process on the CPU; use more only on an idle machine."
    )
    parser.add_argument("--peer_python", default=sys.executable, help="Python interpreter with clip_benchmark.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # also for child processes

    import torch
    from measuring import MissingPeer, Settings

    from gmail_hf.evaluation import environment

    torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(
        device=device,
        dtype=args.dtype or ("bfloat16" if device == "cuda" else "float32"),
        compile=args.compile,
        threads=args.threads,
        workers=8 if device == "cuda" else 0,  # two cores have no room for workers next to training
        quick=args.quick,
        size=args.size,
        batch=args.batch,
        peer_python=args.peer_python,
    )
    result = {
        "settings": vars(settings) | {"peer_python": "another" if args.peer_python != sys.executable else "this one"},
        "rows": [],
        "failed": {},
        "seconds_of": {},
        "environment": environment(Path(__file__).parent),
    }
    start = time.perf_counter()
    for name in args.only or BENCHMARKS:
        began = time.perf_counter()
        try:
            for line in getattr(importlib.import_module(BENCHMARKS[name]), name)(settings):
                result["rows"].append(line)
                print(describe(line), flush=True)
        except (MissingPeer, RuntimeError) as error:
            result["failed"][name] = str(error)
            print(f"{name} failed: {error}", flush=True)
        result["seconds_of"][name] = round(time.perf_counter() - began, 1)
        result["seconds"] = round(time.perf_counter() - start)
        path = write(result, args.output_dir, device)  # after each benchmark, in case of an interruption
        print(f"{name}: {result['seconds_of'][name]} s\n", flush=True)
    print(table(result["rows"]))
    print(f"\n{path}")
    if result["failed"]:
        sys.exit(f"Not finished: {', '.join(result['failed'])}")
    return result


def describe(line: dict[str, Any]) -> str:
    """Describe a row of the table in words."""
    sides = f"{line['benchmark']}: {line['measured']} against {line['against']}"
    if "missing" in line:
        return f"{sides}: missing, {line['missing']}"
    low, high = line["spread"]
    values = f"{line['ours']:.4g} / {line['theirs']:.4g} {line['unit']}"
    text = f"{sides}: {values} = {line['ratio']:.3f} ({low:.3f} to {high:.3f})"
    if line["aim"]:
        text += f", aim {line['aim']}: {'met' if line['met'] else 'missed'}"
    return text + (f" [{line['note']}]" if line["note"] else "")


def measured(line: dict[str, Any]) -> str:
    return line["measured"] + (f" ({line['note']})" if line.get("note") else "")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| name | measured | against | ours | theirs | ratio (spread) | aim |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for line in rows:
        cells = [line["benchmark"], measured(line), line["against"]]
        if "missing" in line:
            cells += ["–", "–", "–", f"missing: {line['missing']}"]
        else:
            low, high = line["spread"]
            aim = f"{line['aim']}, {'met' if line['met'] else 'missed'}" if line["aim"] else "–"
            values = [f"{line[side]:.4g} {line['unit']}" for side in ("ours", "theirs")]
            cells += [*values, f"{line['ratio']:.3f} ({low:.3f} to {high:.3f})", aim]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(result: dict[str, Any], output_dir: Path, device: str) -> Path:
    """Write the JSON file and, if matplotlib is installed, the chart; return the path of the JSON file."""
    output_dir.mkdir(parents=True, exist_ok=True)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    path = output_dir / f"{date}-{device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    try:
        draw(result, path.with_suffix(".svg"))
    except ImportError as error:
        print(f'No chart: {error}: `pip install "gmail-hf[evaluation]"`.')
    return path


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the ratios to peers as bars from 1 on a logarithmic scale, with their spread and a mark at each aim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [line for line in result["rows"] if "missing" not in line and line["against"] != "linear"][::-1]
    figure, axes = pyplot.subplots(figsize=(12, 1 + 0.34 * len(rows)), layout="constrained")
    for place, line in enumerate(rows):
        colour = "0.6" if line["aim"] is None else "tab:blue" if line["met"] else "tab:orange"
        axes.barh(place, line["ratio"] - 1, left=1, color=colour, height=0.6)
        axes.plot(line["spread"], [place, place], color="black", linewidth=1)
        if line["aim"]:
            axes.plot(float(line["aim"].split()[1]), place, "k|", markersize=12)
        axes.text(1.01, place, f"{line['ratio']:.3g}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="0.3", linewidth=0.8)
    labels = ["\n".join(textwrap.wrap(f"{measured(line)} / {line['against']}", 78)) for line in rows]
    names = [f"{line['benchmark']}: {label}" for line, label in zip(rows, labels, strict=True)]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("ratio and its spread; | is the aim, blue meets it, orange misses it, grey has none")
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
