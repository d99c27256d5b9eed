"""Image-text retrieval as a module of `evaluate`."""

import numpy as np

from gmail_hf import metrics
from gmail_hf.metrics.as_evaluate import EMBEDDING, INTEGER, TEXT, evaluate_module

PAIR = {"predictions": EMBEDDING, "references": EMBEDDING}


@evaluate_module("CLIP", {**PAIR, "image_ids": INTEGER}, {**PAIR, "image_ids": TEXT})
def recall_at_k(predictions, references, image_ids, ks=(1, 5, 10)):
    """
    Recall@K and median ranks of image-to-text and text-to-image retrieval by cosine similarity. An image with several
    captions is a hit if any of them is among the first K, as in CLIP's paper. Ties count against the model.

    Args:
        predictions: (n, dim) embeddings of images, converted to float32; row i is the image of caption i. An image
            with five captions has five rows and counts once.
        references: (n, dim) embeddings of captions.
        image_ids: (n,) integers or strings, equal for rows of the same image.
        ks: values of K; 1, 5 and 10 by default.
    Returns:
        {"image_to_text_R@1": in 0..1, ..., "image_to_text_median_rank": from 1, and the same for "text_to_image"}
    Examples:
        >>> images, captions = [[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [0.9, 0.1]]
        >>> metric.compute(predictions=images, references=captions, image_ids=[7, 8], ks=[1])["text_to_image_R@1"]
        0.5
    """
    return metrics.image_text_retrieval(np.float32(predictions), np.float32(references), image_ids, ks=ks)
