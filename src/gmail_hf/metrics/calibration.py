"""How well probabilities fit what happens."""

from __future__ import annotations

import numpy as np


def expected_calibration_error(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = 10) -> float:
    """Mean distance of the predicted probability and the observed frequency of an event, over bins of equal width.

    Each bin counts by its share of the rows. The number has a floor from chance, the higher the fewer the rows.

    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015, with the
    probability of the event in place of the confidence.

    Args:
        probabilities: (n,) of the event, in 0..1.
        outcomes: (n,) whether it happened.
        bins: at least 1.

    Raises:
        ValueError: no rows, another length, or probabilities out of range.
    """
    probabilities, outcomes = np.asarray(probabilities, np.float64), np.asarray(outcomes, bool)
    if probabilities.ndim != 1 or not len(probabilities) or probabilities.shape != outcomes.shape:
        raise ValueError(
            f"probabilities and outcomes need one shape (n,), got {probabilities.shape} and {outcomes.shape}"
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must be in 0..1")
    bin_of = np.minimum((probabilities * bins).astype(int), bins - 1)
    errors = np.bincount(bin_of, probabilities - outcomes, bins)
    return float(np.abs(errors).sum() / len(probabilities))
