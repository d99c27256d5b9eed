"""Zero-shot classification: the class whose captions lie nearest to an image."""

from __future__ import annotations

import numpy as np

from ._checks import check_same_dim, l2_normalize


def class_embeddings(prompt_embeds: np.ndarray) -> np.ndarray:
    """One embedding a class from an ensemble of prompts (Radford et al., 2021, section 3.1.4).

    Args:
        prompt_embeds: (classes, prompts, dim) text embeddings of any length.

    Returns:
        (classes, dim) float64: the mean of the L2-normalised prompts, normalised again.

    Raises:
        ValueError: another shape, or invalid embeddings (the row is named).
    """
    prompt_embeds = np.asarray(prompt_embeds)
    if prompt_embeds.ndim != 3:
        raise ValueError(f"prompt_embeds must have shape (classes, prompts, dim), got {prompt_embeds.shape}")
    classes, prompts, dim = prompt_embeds.shape
    unit = l2_normalize(prompt_embeds.reshape(-1, dim), "prompt_embeds").reshape(classes, prompts, dim)
    return l2_normalize(unit.mean(axis=1), "class embeddings")


def zero_shot_accuracy(image_embeds: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 accuracy by cosine similarity with the class embeddings.

    Args:
        image_embeds: (n, dim) embeddings of any length.
        classes: (classes, dim), see `class_embeddings`.
        labels: (n,) integers, rows of `classes`.

    Returns:
        {"top1": share of images, "mean_per_class": mean over the classes that occur}, each in 0..1. An image that
        lies as near to another class as to its own counts as wrong.

    Raises:
        ValueError: invalid embeddings (the row is named), labels of another length or out of range.
    """
    image_embeds, classes = l2_normalize(image_embeds, "image_embeds"), l2_normalize(classes, "classes")
    check_same_dim(image_embeds, classes, "image_embeds and classes")
    labels = np.asarray(labels)
    if labels.shape != (len(image_embeds),):
        raise ValueError(f"labels must have shape ({len(image_embeds)},), one an image, got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels must be integers in 0..{len(classes) - 1}, the rows of `classes`")
    similarity = image_embeds @ classes.T  # (n, classes)
    own = similarity[np.arange(len(labels)), labels]
    similarity[np.arange(len(labels)), labels] = -np.inf
    hit = own > similarity.max(axis=1)
    per_class = [hit[labels == label].mean() for label in np.unique(labels)]
    return {"top1": float(hit.mean()), "mean_per_class": float(np.mean(per_class))}
