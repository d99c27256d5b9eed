"""Yes-or-no questions about objects in images (POPE): parsing of answers, scores."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np

YES, NO = 0, 1  # indices of `CHOICES`
CHOICES = ("yes", "no")


def parse_yes_no(text: str) -> int:
    """
    Parse an answer by the rule of POPE's `evaluate.py`: it means no if its first sentence, without commas, contains
    the word "No", "no" or "not". Any other answer means yes, even an empty one, so a model that evades questions has a
    high `yes_ratio`. Words are separated by any white space, not only by spaces as in the script.

    Returns:
        The index in ("yes", "no").
    """
    words = text.split(".")[0].replace(",", "").split()
    return NO if {"No", "no", "not"} & set(words) else YES


def yes_no_scores(predictions: Sequence[int], answers: Sequence[int]) -> dict[str, float]:
    """
    Compute the scores of POPE. The positive class is "yes", the object is in the image.

    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, Section 5.

    Args:
        predictions, answers: (n,) indices of ("yes", "no"), see `parse_yes_no`.

    Returns:
        {"accuracy", "precision", "recall", "F1", "yes_ratio": share of predictions that are yes}, each in 0..1. A
        score whose denominator is 0, such as the precision of a model that always says no, is 0.

    Raises:
        ValueError: no answers, lists of different lengths, or values other than 0 and 1.
    """
    if not len(answers) or len(predictions) != len(answers):
        raise ValueError(
            f"got {len(predictions)} predictions and {len(answers)} answers; pass one prediction per answer, and at "
            "least one"
        )
    for name, values in (("predictions", predictions), ("answers", answers)):
        bad = [value for value in values if not isinstance(value, Integral) or value not in (YES, NO)]
        if bad:
            raise ValueError(f"{name} must be 0 for yes or 1 for no, got {bad[0]!r}; see `parse_yes_no`")
    says, is_there = np.equal(predictions, YES), np.equal(answers, YES)
    right = int((says & is_there).sum())
    precision, recall = _share(right, says.sum()), _share(right, is_there.sum())
    return {
        "accuracy": float((says == is_there).mean()),
        "precision": precision,
        "recall": recall,
        "F1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": float(says.mean()),
    }


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
