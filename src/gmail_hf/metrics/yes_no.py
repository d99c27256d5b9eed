"""Yes-or-no questions about objects in images, POPE: answers read from text, scores."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np

YES, NO = 0, 1  # indices of `CHOICES`
CHOICES = ("yes", "no")


def parse_yes_no(text: str) -> int:
    """
    What an answer says, by the rule of POPE's `evaluate.py`: of its first sentence, commas left out, any of the words
    "No", "no" and "not" means no. Everything else means yes, an empty answer too, so a model that evades the question
    has a high `yes_ratio`. Words are separated by any white space, where the script takes spaces alone.

    Returns:
        The index in ("yes", "no").
    """
    words = text.split(".")[0].replace(",", "").split()
    return NO if {"No", "no", "not"} & set(words) else YES


def yes_no_scores(predictions: Sequence[int], answers: Sequence[int]) -> dict[str, float]:
    """
    Scores of POPE, in which "yes", the object is there, is the positive class.

    Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023, Section 5.

    Args:
        predictions, answers: (n,) indices of ("yes", "no"), see `parse_yes_no`.

    Returns:
        {"accuracy", "precision", "recall", "F1", "yes_ratio": share of predictions that are yes}, each in 0..1; a
        score without a denominator, such as the precision of a model that always says no, is 0.

    Raises:
        ValueError: nothing to score, lists of unequal length, or something other than 0 and 1.
    """
    if not len(answers) or len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers: give one for each, and some.")
    for name, values in (("predictions", predictions), ("answers", answers)):
        bad = [value for value in values if not isinstance(value, Integral) or value not in (YES, NO)]
        if bad:
            raise ValueError(f"{name} are 0 for yes and 1 for no, got {bad[0]!r}; see `parse_yes_no`")
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
