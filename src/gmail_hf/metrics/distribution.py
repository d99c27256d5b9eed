"""Distances between the distributions of generated and real embeddings."""

from __future__ import annotations

import numpy as np

from ._checks import blocks, check_same_dim, l2_normalize

SIGMA, SCALE = 10.0, 1000.0


def cmmd(generated: np.ndarray, real: np.ndarray) -> float:
    """Squared maximum mean discrepancy with the kernel exp(-||x - y||^2 / (2 sigma^2)), sigma = 10, times 1000.

    Source: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation" (CMMD), CVPR
    2024, which embeds with CLIP ViT-L/14 at 336 pixels. Values of different models are not comparable. As in the
    authors' code, the means include each embedding's kernel with itself: the result is never negative, and two sets
    of n images from one distribution give about 10 / n.

    Args:
        generated, real: (n, dim) and (m, dim) embeddings, L2-normalised here.

    Raises:
        ValueError: invalid embeddings (the error gives the row), or different dimensions.
    """
    generated, real = _unit(generated, real)
    within = _mean_kernel(generated, generated) + _mean_kernel(real, real)
    return SCALE * max(within - 2 * _mean_kernel(generated, real), 0.0)


def energy_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Energy distance 2 mean ||g - r|| - mean ||g - g'|| - mean ||r - r'||; g, g' and r, r' are different images.

    This is the loss of recipe robust, [`energy_distance_loss`], for sets of one caption: an unbiased estimate, which
    can fall below 0 by chance. The mean within a set of one image is 0.

    Source: Szekely and Rizzo, "Energy statistics: A class of statistics based on distances", 2013.

    Args:
        generated, real: (n, dim) and (m, dim) embeddings, L2-normalised here.

    Raises:
        ValueError: invalid embeddings (the error gives the row), or different dimensions.
    """
    generated, real = _unit(generated, real)
    between = _sum_of_distances(generated, real) / (len(generated) * len(real))
    within = (_sum_of_distances(rows, rows) / max(len(rows) * (len(rows) - 1), 1) for rows in (generated, real))
    return float(2 * between - sum(within))


def density_coverage(generated: np.ndarray, real: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage of generated images, by balls around real images that reach to their k-th real neighbour.

    Density is the mean number of balls that contain a generated image, divided by k. Images from the real distribution
    have an expected density of 1, images far from it a lower one. Coverage is the share of balls that contain at least
    one generated image, in 0..1. For equally many images from the real distribution, about 1 - 2^-k is expected.

    Source: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, eqs. 4 and 5.

    Args:
        generated, real: (n, dim) and (m, dim) embeddings, L2-normalised here, compared by Euclidean distance.
        k: at least 1 and less than m.

    Raises:
        ValueError: invalid embeddings (the error gives the row), different dimensions, or k out of range.
    """
    generated, real = _unit(generated, real)
    if not 1 <= k < len(real):
        raise ValueError(f"k must be at least 1 and less than the number of real images, {len(real)}, got {k}")
    held, covered = 0, 0
    for rows in blocks(np.arange(len(real))):
        own = real[rows] @ real.T  # for unit vectors, a larger cosine is a smaller distance
        own[np.arange(len(own)), rows] = -np.inf
        inside = real[rows] @ generated.T > np.partition(own, -k, axis=1)[:, -k, None]
        held, covered = held + inside.sum(), covered + inside.any(axis=1).sum()
    return float(held / (k * len(generated))), float(covered / len(real))


def _unit(generated: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    generated, real = l2_normalize(generated, "generated"), l2_normalize(real, "real")
    check_same_dim(generated, real, "generated and real")
    return generated, real


def _mean_kernel(first: np.ndarray, second: np.ndarray) -> float:
    sums = (np.exp((rows @ second.T - 1) / SIGMA**2).sum() for rows in blocks(first))
    return sum(sums) / (len(first) * len(second))


def _sum_of_distances(first: np.ndarray, second: np.ndarray) -> float:
    return sum(np.sqrt(np.maximum(2 - 2 * rows @ second.T, 0)).sum() for rows in blocks(first))
