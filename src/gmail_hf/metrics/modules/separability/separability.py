"""Separability of generated and real embeddings as a module of `evaluate`."""

import numpy as np

from gmail_hf import metrics
from gmail_hf.metrics.as_evaluate import EMBEDDING, evaluate_module


@evaluate_module("GMAIL", {"predictions": EMBEDDING, "references": EMBEDDING})
def separability(predictions, references, seed=0, folds=5):
    """
    Cross-validated accuracy of a linear probe that separates embeddings of generated from those of real images: 0.5
    is chance, 1.0 a clean split. It detects a gap between the modalities that retrieval, which only ranks, can miss.

    Args:
        predictions: (n, dim) embeddings of generated images; they are kept in float32.
        references: (n, dim) embeddings of real images, row i the partner of row i of predictions.
        seed: draws the folds; by default 0.
        folds: at least 2, at most n; by default 5.
    Returns:
        {"separability": in 0..1}
    Examples:
        >>> metric.compute(predictions=[[1.0, 0.1], [1.0, 0.2]] * 5, references=[[0.1, 1.0], [0.2, 1.0]] * 5)
        {'separability': 1.0}
    """
    return {"separability": metrics.separability(np.float32(predictions), np.float32(references), seed, folds)}
