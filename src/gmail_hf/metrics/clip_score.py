"""CLIPScore and RefCLIPScore: how well captions fit their images, measured with CLIP embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._checks import check_pairs, check_same_dim, l2_normalize

# Prefix of each caption and reference before it is embedded (the paper, Section 3).
CLIP_SCORE_PROMPT = "A photo depicts "
WEIGHT = 2.5


def clip_score(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """CLIPScore of each image and its caption: 2.5 max(cos(image, caption), 0), in 0..2.5.

    The score of a set is the mean over its images. Published figures use CLIP ViT-B/32 and put `CLIP_SCORE_PROMPT`
    before each caption. Scores of different models are not comparable.

    Source: Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", EMNLP 2021, Section 3.

    Args:
        images, captions: (n, dim) embeddings; row i of both is one pair. They are L2-normalised here.

    Returns:
        (n,) float64.

    Raises:
        ValueError: invalid embeddings (the error gives the row), or arrays of different shapes.
    """
    images, captions = l2_normalize(images, "images"), l2_normalize(captions, "captions")
    check_pairs(images, captions, "images and captions")
    return WEIGHT * np.maximum((images * captions).sum(axis=1), 0)


def ref_clip_score(images: np.ndarray, captions: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """RefCLIPScore of each caption: the harmonic mean of its CLIPScore and its largest cosine to a reference.

    A negative cosine counts as 0, and a mean with a 0 is 0. See [`clip_score`]; Hessel et al. (2021), Section 3.

    Args:
        images, captions: (n, dim) embeddings; row i of both is one pair.
        references: n arrays of shape (k, dim), the embeddings of an image's k references. k may differ per image.

    Returns:
        (n,) float64, in 0..10/7.

    Raises:
        ValueError: invalid embeddings (the error gives the row), or different dimensions or numbers of images.
    """
    scores, captions = clip_score(images, captions), l2_normalize(captions, "captions")
    if len(references) != len(captions):
        raise ValueError(f"got {len(captions)} captions, but references of {len(references)} images")
    nearest = np.zeros(len(captions))
    for row, given in enumerate(references):
        name = f"references of row {row}"
        given = l2_normalize(given, name)
        check_same_dim(captions, given, f"captions and {name}")
        nearest[row] = max((given @ captions[row]).max(), 0)
    total = scores + nearest
    return np.divide(2 * scores * nearest, total, out=np.zeros(len(captions)), where=total > 0)
