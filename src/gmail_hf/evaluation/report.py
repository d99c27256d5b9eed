"""Reports of results: a self-contained HTML file, and provenance in Markdown."""

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image as PILImage

from ..metrics.scores import TASKS, counted, label, number
from ..publishing.provenance import without_paths
from ..training.data import decode_image

THUMBNAIL = 320  # longer side of an example, in pixels
SMALL = 64  # images with a longer side of at most 64 pixels are shown pixelated
NOTES = {
    "captioning": "The model's captions, with a reference in grey if it differs.",
    "vqa": "The model's answers, with the question and the correct answer in grey.",
}
# These suffixes of score names become columns. The rest of a name becomes the row.
COLUMNS = {
    "retrieval": {"_R@1": "R@1", "_R@5": "R@5", "_R@10": "R@10", "_median_rank": "median rank"},
    "alignment": {"_before": "before", "_after": "after"},
}


def provenance(result: dict[str, Any]) -> list[str]:
    """Write machine, software, date and, if known, commit of a result as a Markdown list."""
    where = result["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items() if number)
    commit = where.get("git_commit")
    return [
        f"- machine: {where['machine']}; {result['seconds']} s in total",
        f"- software: Python {where['python']}, {packages}",
        *([f"- git commit: {commit}" + " with uncommitted changes" * where["uncommitted_changes"]] if commit else []),
        f"- date: {where['date']}",
    ]


def to_html(results: Sequence[dict[str, Any]], output_dir: str | os.PathLike) -> str:
    """
    Write a self-contained page with scores, intervals, examples and figures.

    Args:
        results: contents of result files, see `results_in`.
        output_dir: folder of these files and their pictures.
    """
    folder = Path(output_dir).resolve()

    def picture(file: str) -> Path:
        path = folder.joinpath(file).resolve()
        if not path.is_relative_to(folder):  # result files may come from elsewhere
            raise ValueError(f"A result file in '{folder}' refers to '{file}', which is outside that folder.")
        return path

    def inline(file: str) -> str:
        return data_uri(picture(file).read_bytes(), Path(file).suffix[1:])

    def is_small(file: str) -> bool:
        with PILImage.open(picture(file), formats=["PNG", "WEBP"]) as image:
            return max(image.size) <= SMALL

    models = dict.fromkeys((model["name"], model["revision"]) for r in results for model in r["models"].values())
    models = [(without_paths(name), revision) for name, revision in models]
    # People share the page: it names no folder of the machine.
    results = [
        {**result, **{key: without_paths(result[key]) for key in ("dataset", "models", "settings")}}
        for result in results
    ]
    return render(
        "report.html.jinja",
        {"inline": inline, "is_small": is_small},
        results=results,
        models=models,
        titles=TASKS,
        notes=NOTES,
        tabulate=tabulate,
    )


def render(template: str, filters: Mapping[str, Callable] | None = None, **values: Any) -> str:
    """Render a template of this folder."""
    page = Environment(
        loader=PackageLoader("gmail_hf", "evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page.filters |= {"counted": counted, **(filters or {})}
    return page.get_template(template).render(values)


def thumbnail(cell: Any) -> dict[str, Any]:
    """Return an image cell as `src` of an HTML image, and whether it is `small` and shown pixelated."""
    image, content = decode_image(cell), BytesIO()
    small = max(image.size) <= SMALL
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(content, "WEBP", lossless=small, quality=85)
    return {"src": data_uri(content.getvalue(), "webp"), "small": small}


def data_uri(content: bytes, kind: str) -> str:
    """Return an image of this kind, such as `png`, as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def tabulate(task: str, measured: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """
    Arrange the scores of a task as a table: column titles, and rows with a label and cells.

    A cell is None or has `value`, `low` and `high` as text, and `bar` with the three as percentages.
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
