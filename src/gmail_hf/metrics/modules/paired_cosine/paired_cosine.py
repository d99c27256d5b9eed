"""Paired cosine similarity as a module of `evaluate`."""

import numpy as np

from gmail_hf import metrics
from gmail_hf.metrics.as_evaluate import EMBEDDING, evaluate_module


@evaluate_module("GMAIL", {"predictions": EMBEDDING, "references": EMBEDDING})
def paired_cosine(predictions, references):
    """
    Mean cosine similarity between the embeddings of generated images and of their real partners: GMAIL's measure of
    alignment.

    Args:
        predictions: (n, dim) embeddings of generated images, converted to float32.
        references: (n, dim) embeddings of real images; row i is the partner of row i of predictions.
    Returns:
        {"paired_cosine": in -1..1}
    Examples:
        >>> metric.compute(predictions=[[2.0, 0.0], [0.0, 1.0]], references=[[1.0, 0.0], [3.0, 0.0]])
        {'paired_cosine': 0.5}
    """
    return {"paired_cosine": metrics.paired_cosine(np.float32(predictions), np.float32(references))}
