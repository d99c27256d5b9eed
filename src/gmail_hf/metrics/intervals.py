"""Bootstrap confidence intervals of scores."""

from __future__ import annotations

import numpy as np

from ._checks import optional_import

# Values in one batch of resamples: 32 MiB.
BATCH_VALUES = 2**22


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, seed: int = 0, num_resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over items (Efron & Tibshirani, 1993, chapter 13).

    For Recall@K or accuracy, pass `ranks <= k` of `image_text_ranks` or `zero_shot_ranks`. Items count as
    independent. Captions of one image are not, so an interval over captions is somewhat too narrow. If all values are
    equal, the interval has zero width, although further items could differ.

    Args:
        values: (n,) numbers or bools, one per item.
        confidence: level of the two-sided interval, between 0 and 1.
        seed: seed of the resamples.
        num_resamples: number of resamples of n items, drawn with replacement.

    Returns:
        (low, high), around the mean of `values`.

    Raises:
        ValueError: `values` is not a non-empty vector of finite numbers, or `confidence` or `num_resamples` is out of
            range.
        ImportError: SciPy is missing.
    """
    values = np.asarray(values)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a non-empty vector, one value per item, got shape {values.shape}")
    values = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"values has NaN or infinite values, first at item {bad[0]}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    if values.min() == values.max():
        return float(values[0]), float(values[0])
    result = optional_import("scipy.stats").bootstrap(
        (values,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, BATCH_VALUES // len(values)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
