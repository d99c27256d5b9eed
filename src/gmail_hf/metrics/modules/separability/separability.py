"""Separability of generated and real embeddings as a module of `evaluate`."""

import numpy as np

from gmail_hf import metrics
from gmail_hf.metrics.as_evaluate import EMBEDDING, evaluate_module


@evaluate_module("GMAIL", {"predictions": EMBEDDING, "references": EMBEDDING})
def separability(predictions, references, seed=0, folds=5):
    """
    Cross-validated accuracy of a linear probe that separates the embeddings of generated and real images: 0.5 is
    chance, 1.0 full separation. It detects a gap between the modalities that retrieval, which only ranks, can miss.

    Args:
        predictions: (n, dim) embeddings of generated images, converted to float32.
        references: (n, dim) embeddings of real images; row i is the partner of row i of predictions.
        seed: seed of the folds; 0 by default.
        folds: at least 2, at most n; 5 by default.
    Returns:
        {"separability": in 0..1}
    Examples:
        >>> metric.compute(predictions=[[1.0, 0.1], [1.0, 0.2]] * 5, references=[[0.1, 1.0], [0.2, 1.0]] * 5)
        {'separability': 1.0}
    """
    return {"separability": metrics.separability(np.float32(predictions), np.float32(references), seed, folds)}
