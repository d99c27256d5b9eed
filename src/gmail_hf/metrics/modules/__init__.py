"""
The scores as modules of the `evaluate` library: one folder each, for `evaluate.load(metric_path(name))`.

Each hands what it was given to the function of `gmail_hf.metrics`, and works without a model of ours. `evaluate`
passes embeddings through files and lists: with tens of thousands of rows the functions themselves are several times
faster. In `evaluate.combine`, add inputs that not all modules share by `add_batch`; its `compute` passes them to all.
"""

from __future__ import annotations

from pathlib import Path

METRICS = (
    "caption_scores",
    "multiple_choice_accuracy",
    "paired_cosine",
    "recall_at_k",
    "separability",
    "zero_shot_accuracy",
)


def metric_path(name: str) -> str:
    """The folder of a module, for `evaluate.load`.

    Args:
        name: one of `METRICS`.

    Raises:
        ValueError: there is no such module.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; there are {list(METRICS)}")
    return str(Path(__file__).parent / name)
