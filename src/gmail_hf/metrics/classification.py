"""Zero-shot classification by the class embedding nearest to an image."""

from __future__ import annotations

import numpy as np

from ._checks import UnitRows, check_same_dim, l2_normalize
from .ranks import unit_ranks


def class_embeddings(prompt_embeds: np.ndarray) -> np.ndarray:
    """Average an ensemble of prompts into one embedding per class (Radford et al., 2021, section 3.1.4).

    Args:
        prompt_embeds: (classes, prompts, dim) text embeddings of any norm.

    Returns:
        (classes, dim) float64: the mean of the L2-normalised prompts, normalised again.

    Raises:
        ValueError: wrong shape, or invalid embeddings (the error gives the row).
    """
    prompt_embeds = np.asarray(prompt_embeds)
    if prompt_embeds.ndim != 3:
        raise ValueError(f"prompt_embeds must have shape (classes, prompts, dim), got {prompt_embeds.shape}")
    classes, prompts, dim = prompt_embeds.shape
    if not prompt_embeds.size:
        raise ValueError(f"prompt_embeds is empty (shape {prompt_embeds.shape}); pass at least one prompt per class")
    unit = UnitRows(prompt_embeds.reshape(-1, dim), "prompt_embeds")
    means = [unit[k * prompts : (k + 1) * prompts].mean(axis=0) for k in range(classes)]
    return l2_normalize(np.stack(means), "class embeddings")


def zero_shot_ranks(image_embeds: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of each image's own class by cosine similarity; the best rank is 1. Top-1 hits are `ranks == 1`.

    Args:
        image_embeds: (n, dim) embeddings of any norm.
        classes: (classes, dim), see `class_embeddings`.
        labels: (n,) integers, rows of `classes`.

    Returns:
        (n,) int64 ranks. A class that ties with the image's own class is ranked before it.

    Raises:
        ValueError: invalid embeddings (the error gives the row), or labels of the wrong length or out of range.
    """
    images, classes = UnitRows(image_embeds, "image_embeds"), UnitRows(classes, "classes")
    check_same_dim(images, classes, "image_embeds and classes")
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"labels must have shape ({len(images)},), one per image, got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels must be integers in 0..{len(classes) - 1}, the rows of `classes`")
    return unit_ranks(images, classes, [(labels, np.arange(len(classes)))])[0]


def zero_shot_accuracy(image_embeds: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 accuracy by cosine similarity with the class embeddings.

    Args:
        image_embeds, classes, labels: as in `zero_shot_ranks`.

    Returns:
        {"top1": share of images, "mean_per_class": mean over the classes that occur}, each in 0..1. An image that
        is equally near to another class counts as wrong.

    Raises:
        ValueError: as `zero_shot_ranks`.
    """
    hit = zero_shot_ranks(image_embeds, classes, labels) == 1
    images = np.bincount(labels)  # (classes,)
    per_class = np.bincount(labels, hit)[images > 0] / images[images > 0]
    return {"top1": float(hit.mean()), "mean_per_class": float(per_class.mean())}
