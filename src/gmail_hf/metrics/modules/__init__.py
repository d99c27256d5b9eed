"""
The scores as modules of the `evaluate` library: one folder each, for `evaluate.load(metric_path(name))`.

Each calls the function of the same meaning in `gmail_hf.metrics` and needs no model of this package. `evaluate` passes
embeddings through files and lists: for tens of thousands of rows, calling the functions is several times faster. In
`evaluate.combine`, use `add_batch` for inputs that not all modules share; its `compute` passes all inputs to each one.
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
    """The folder of a module, for `evaluate.load`.

    Args:
        name: one of `METRICS`.

    Raises:
        ValueError: `name` is none of them.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; there are {list(METRICS)}")
    return str(Path(__file__).parent / name)
