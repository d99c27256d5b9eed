"""CLIPScore as a module of `evaluate`."""

from gmail_hf import metrics as functions
from gmail_hf.metrics.as_evaluate import EMBEDDING, evaluate_module


@evaluate_module("CLIPScore", {"predictions": EMBEDDING, "references": EMBEDDING})
def clip_score(predictions, references):
    """
    CLIPScore: 2.5 times the cosine of an image and its caption, at least 0; the mean over all images.

    Args:
        predictions: (n, dim) embeddings of captions after the prompt `gmail_hf.metrics.CLIP_SCORE_PROMPT`, by the CLIP
            that also embeds the images; published figures use ViT-B/32.
        references: (n, dim) embeddings of their images.
    Returns:
        {"clip_score": in 0..2.5}
    Examples:
        >>> metric.compute(predictions=[[2.0, 0.0], [1.0, 0.0]], references=[[1.0, 0.0], [0.0, 1.0]])
        {'clip_score': 1.25}
    """
    return {"clip_score": float(functions.clip_score(references, predictions).mean())}
