"""
Metrics as modules of the `evaluate` library, for `evaluate.load(metric_path(name))`.

Each module calls a function of `gmail_hf.metrics`. `evaluate` passes embeddings through files and lists, so calling
the functions is several times faster for tens of thousands of rows. With `evaluate.combine`, use `add_batch` if the
modules have different inputs, because its `compute` passes all inputs to every module.
"""

from __future__ import annotations

from pathlib import Path

METRICS = (
    "caption_scores",
    "clip_score",
    "multiple_choice_accuracy",
    "paired_cosine",
    "recall_at_k",
    "separability",
    "yes_no_scores",
    "zero_shot_accuracy",
)


def metric_path(name: str) -> str:
    """Return the folder of a module, for `evaluate.load`.

    Args:
        name: one of `METRICS`.

    Raises:
        ValueError: unknown metric.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; choose from {list(METRICS)}")
    return str(Path(__file__).parent / name)
