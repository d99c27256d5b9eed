"""POPE's scores of yes-or-no questions as a module of `evaluate`."""

from gmail_hf import metrics as functions
from gmail_hf.metrics.as_evaluate import INTEGER, evaluate_module


@evaluate_module("POPE", {"predictions": INTEGER, "references": INTEGER})
def yes_no_scores(predictions, references):
    """
    Accuracy, precision, recall and F1 of yes-or-no questions, with yes as the positive class, and the share of yes.

    Args:
        predictions: (n,) 0 for yes and 1 for no, see `gmail_hf.metrics.parse_yes_no`.
        references: (n,) the correct answers.
    Returns:
        {"accuracy", "precision", "recall", "F1", "yes_ratio"}, each in 0..1
    Examples:
        >>> metric.compute(predictions=[0, 0, 1, 0], references=[0, 1, 1, 0])["yes_ratio"]
        0.75
    """
    return functions.yes_no_scores(predictions, references)
