"""Accuracy of multiple-choice questions as a module of `evaluate`."""

from gmail_hf.metrics import answers
from gmail_hf.metrics.as_evaluate import INTEGER, evaluate_module


@evaluate_module("ScienceQA", {"predictions": INTEGER, "references": INTEGER})
def multiple_choice_accuracy(predictions, references):
    """
    Share of multiple-choice questions with the correct answer. An answer without a recognisable choice is wrong.

    Args:
        predictions: (n,) indices of choices, or None if no choice was found; see `gmail_hf.metrics.parse_choice`.
        references: (n,) indices of the correct choices.
    Returns:
        {"accuracy": in 0..1, "unparsed": share of None}
    Examples:
        >>> metric.compute(predictions=[0, 2, None, 1], references=[0, 2, 3, 0])
        {'accuracy': 0.5, 'unparsed': 0.25}
    """
    return answers.multiple_choice_accuracy(predictions, references)
