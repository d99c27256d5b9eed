"""Zero-shot classification as a module of `evaluate`."""

import numpy as np

from gmail_hf import metrics
from gmail_hf.metrics.as_evaluate import EMBEDDING, INTEGER, evaluate_module


@evaluate_module("CLIP", {"predictions": EMBEDDING, "references": INTEGER})
def zero_shot_accuracy(predictions, references, classes):
    """
    Top-1 accuracy of images classified by the nearest class embedding, by cosine similarity, over images and as the
    mean over the classes that occur. An image as near to another class as to its own counts as wrong.

    Args:
        predictions: (n, dim) embeddings of images; they are kept in float32.
        references: (n,) integers, the rows of `classes` that are right.
        classes: (classes, dim) embeddings, see `gmail_hf.metrics.class_embeddings`; an argument of `compute`.
    Returns:
        {"top1": in 0..1, "mean_per_class": in 0..1}
    Examples:
        >>> metric.compute(predictions=[[3.0, 1.0], [1.0, 3.0]], references=[0, 0], classes=[[1.0, 0.0], [0.0, 1.0]])
        {'top1': 0.5, 'mean_per_class': 0.5}
    """
    return metrics.zero_shot_accuracy(np.float32(predictions), np.asarray(classes), np.asarray(references))
