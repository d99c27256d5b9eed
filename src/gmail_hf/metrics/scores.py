"""Names of tasks and scores, number formats, result files and their Markdown table."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = {
    "retrieval": "Image-text retrieval",
    "zero_shot": "Zero-shot classification",
    "probe": "Linear probe",
    "captioning": "Captions",
    "vqa": "Questions",
    "alignment": "Alignment of generated with real images",
}
WRITTEN = ("captioning", "vqa")  # tasks of image-text-to-text models
LABELS = {
    "image_to_text": "image to text",
    "text_to_image": "text to image",
    "median_rank": "median rank",
    "top1": "top-1",
    "mean_per_class": "mean per class",
    "exact_match": "exact match",
    "ref_clip_score": "RefCLIPScore",
    "clip_score": "CLIPScore",
    "gen_to_real": "generated to real",
    "paired_cosine": "paired cosine",
    "centroid_distance": "distance of centroids",
}


def escaped(value: Any) -> Any:
    """Escape HTML, table cells and code for Markdown and put each text on one line, also in lists and mappings."""
    if isinstance(value, str):
        text = " ".join(value.split())
        for sign, harmless in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("`", "'"), ("|", "\\|")):
            text = text.replace(sign, harmless)
        return text
    if isinstance(value, dict):
        return {escaped(key): escaped(item) for key, item in value.items()}
    return type(value)(map(escaped, value)) if isinstance(value, (list, tuple)) else value


def results_in(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the benchmark result files in a folder, sorted by file name. Other JSON files are ignored."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(output_dir).glob("*.json"))]
    return [content for content in contents if isinstance(content, dict) and {"benchmark", "tasks"} <= content.keys()]


def to_markdown(results: Sequence[dict[str, Any]]) -> str:
    """
    Write all scores as one Markdown table.

    Args:
        results: contents of result files, see `results_in`.
    """
    lines = ["| benchmark | task | score | value | 95 % interval | of |", "|---|---|---|---:|---:|---|"]
    for result in map(escaped, results):
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


def label(name: str) -> str:
    """Return a score's name in words."""
    for part, words in LABELS.items():
        name = name.replace(part, words)
    return name.replace("_", " ")


def number(name: str, value: float) -> str:
    return f"{value:.1f}" if "rank" in name else f"{value:.3f}"


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
