"""Zero-shot classification as a module of `evaluate`."""

import numpy as np

from gmail_hf import metrics
from gmail_hf.metrics.as_evaluate import EMBEDDING, INTEGER, evaluate_module


@evaluate_module("CLIP", {"predictions": EMBEDDING, "references": INTEGER})
def zero_shot_accuracy(predictions, references, classes):
    """
    Top-1 accuracy of images classified by the nearest class embedding in cosine similarity: the share of all images,
    and the mean over the classes that occur. An image that is equally near to another class counts as wrong.

    Args:
        predictions: (n, dim) embeddings of images, converted to float32.
        references: (n,) integers, the rows of `classes` of the correct classes.
        classes: (classes, dim) embeddings, see `gmail_hf.metrics.class_embeddings`. Pass them to `compute`.
    Returns:
        {"top1": in 0..1, "mean_per_class": in 0..1}
    Examples:
        >>> metric.compute(predictions=[[3.0, 1.0], [1.0, 3.0]], references=[0, 0], classes=[[1.0, 0.0], [0.0, 1.0]])
        {'top1': 0.5, 'mean_per_class': 0.5}
    """
    return metrics.zero_shot_accuracy(np.float32(predictions), np.asarray(classes), np.asarray(references))
