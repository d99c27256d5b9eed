"""Results for people: one Markdown table, and one HTML file that needs nothing beside it."""

import base64
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from PIL import Image as PILImage

SMALL = 64  # pixels of the longer side, up to which an image is shown as pixels
PACKAGES = (
    *("gmail-hf", "torch", "transformers", "peft", "datasets", "diffusers"),
    *("scikit-learn", "scipy", "numpy", "pycocoevalcap"),
)
TASKS = {
    "retrieval": "Image-text retrieval",
    "zero_shot": "Zero-shot classification",
    "captioning": "Captions",
    "vqa": "Questions",
    "alignment": "Alignment of generated with real images",
}
NOTES = {
    "captioning": "What the model wrote; in grey, where it differs, a reference.",
    "vqa": "What the model wrote; in grey, the question and the right answer.",
}
LABELS = {
    "image_to_text": "image to text",
    "text_to_image": "text to image",
    "median_rank": "median rank",
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "exact_match": "exact match",
    "gen_to_real": "generated to real",
    "paired_cosine": "paired cosine",
    "centroid_distance": "distance of centroids",
    "separability": "told apart by a line",
}
# Scores are tabulated by these parts of their names: the rest names the row.
COLUMNS = {
    "retrieval": {"_R@1": "R@1", "_R@5": "R@5", "_R@10": "R@10", "_median_rank": "median rank"},
    "alignment": {"_before": "before", "_after": "after"},
}


def environment(repository: str | os.PathLike | None = None) -> dict[str, Any]:
    """When and where something was computed: date, machine, device, Python, versions of packages.

    Args:
        repository: a folder inside a git checkout; its commit, and whether there are changes to it, are told too.
    """
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {device}",
        "python": platform.python_version(),
        "packages": packages,
    }
    if repository is not None:
        git = ["git", "-C", str(repository)]
        answers = [
            subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        found |= {"git_commit": answers[0] or None, "uncommitted_changes": bool(answers[1])}
    return found


def provenance(result: dict[str, Any]) -> list[str]:
    """Lines of a Markdown list: machine, software, commit and date of a result with `environment` and `seconds`."""
    where = result["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items() if number)
    return [
        f"- machine: {where['machine']}; {result['seconds']} s in all",
        f"- software: Python {where['python']}, {packages}",
        f"- git commit: {where['git_commit']}" + (" with uncommitted changes" * where["uncommitted_changes"]),
        f"- date: {where['date']}",
    ]


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    """
    One table of all scores.

    Args:
        results: contents of result files, see `results_in`.
    """
    lines = ["| benchmark | task | score | value | 95 % interval | of |", "|---|---|---|---:|---:|---|"]
    for result in results:
        for task, measured in result["tasks"].items():
            for name, score in measured["scores"].items():
                ends = measured["intervals"].get(name)
                cells = [
                    result["title"],
                    TASKS[task],
                    label(name),
                    "–" if score is None else number(name, score),
                    "–" if ends is None else " to ".join(number(name, end) for end in ends),
                    counted(measured["counts"]) if score is not None else measured["missing"][name],
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def to_html(results: Sequence[dict[str, Any]], output_dir: str | os.PathLike) -> str:
    """
    A page with the scores, their intervals, examples and figures, all of it inline.

    Args:
        results: contents of result files, see `results_in`.
        output_dir: the folder that these files are in, and the pictures that they name.
    """

    def inline(file: str) -> str:
        content = base64.b64encode(Path(output_dir, file).read_bytes()).decode()
        return f"data:image/{Path(file).suffix[1:]};base64,{content}"

    def is_small(file: str) -> bool:
        with PILImage.open(Path(output_dir, file)) as image:
            return max(image.size) <= SMALL

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"inline": inline, "is_small": is_small, "counted": counted}
    source = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    return page.from_string(source).render(
        results=results,
        models=list({model["name"]: model["revision"] for r in results for model in r["models"].values()}.items()),
        titles=TASKS,
        notes=NOTES,
        tabulate=tabulate,
    )


def tabulate(task: str, measured: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """
    Scores of a task as a table: titles of the columns, and rows of a label and cells.

    A cell is None or has `value`, `low`, `high` (texts) and `bar`, the three as parts of 100 where they are shares.
    """
    suffixes = COLUMNS.get(task, {})
    rows: dict[str, dict[str, Any]] = {}
    for name, score in measured["scores"].items():
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), "")
        rows.setdefault(name.removesuffix(suffix), {})[suffix] = _cell(name, score, measured)
    used = [suffix for suffix in suffixes if any(suffix in cells for cells in rows.values())]
    if not used:
        return ["score"], [{"label": label(name), "cells": [cells[""]]} for name, cells in rows.items()]
    table = [{"label": label(name), "cells": [cells.get(suffix) for suffix in used]} for name, cells in rows.items()]
    return [suffixes[suffix] for suffix in used], table


def _cell(name: str, score: float | None, measured: dict[str, Any]) -> dict[str, Any]:
    if score is None:
        return {"value": "missing", "why": measured["missing"][name]}
    low, high = measured["intervals"].get(name, (None, None))
    if low is None:
        return {"value": number(name, score)}
    bar = [round(100 * min(max(value, 0), 1), 2) for value in (low, score, high)]
    return {"value": number(name, score), "low": number(name, low), "high": number(name, high), "bar": bar}


def label(name: str) -> str:
    """A score's name in words."""
    for part, words in LABELS.items():
        name = name.replace(part, words)
    return name.replace("_", " ")


def number(name: str, value: float) -> str:
    return f"{value:.1f}" if "rank" in name else f"{value:.3f}"


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
