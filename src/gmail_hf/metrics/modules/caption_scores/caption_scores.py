"""COCO caption scores as a module of `evaluate`."""

import datasets

from gmail_hf import metrics as functions
from gmail_hf.metrics.as_evaluate import TEXT, evaluate_module


@evaluate_module("COCO captions", {"predictions": TEXT, "references": datasets.Sequence(TEXT)})
def caption_scores(predictions, references, metrics=functions.CAPTION_METRICS, word_vectors=None):
    """
    BLEU@4, METEOR, CIDEr and ROUGE-L of captions, computed with the COCO evaluation code that papers use. They need
    `pip install "gmail-hf[captioning]"` and Java 11 or newer. A score that cannot be computed is None.

    Args:
        predictions: (n,) captions, one per image.
        references: (n,) lists of captions, one or more per image.
        metrics: names of scores; these four by default.
        word_vectors: file in word2vec's format, needed for WMD.
    Returns:
        {"BLEU@4": in 0..1, "METEOR": in 0..1, "CIDEr": in 0..10, "ROUGE-L": in 0..1}
    Examples:
        >>> metric.compute(predictions=["a red three"], references=[["a red three"]], metrics=["ROUGE-L"])
        {'ROUGE-L': 1.0}
    """
    return functions.caption_metrics(predictions, references, metrics, word_vectors)
