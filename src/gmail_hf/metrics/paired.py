"""Alignment of two sets of embeddings: cosine of pairs, distance of centroids, and separability by a linear probe.

Read the three together. Eq. 1 of the paper only ranks, so every embedding can be nearest to its partner while a linear
probe still separates the two sets perfectly.
"""

from __future__ import annotations

import numpy as np

from ._checks import check_labels, check_pairs, check_same_dim, l2_normalize
from .ranks import recall_at_k, retrieval_ranks
from .readout import standardized_regression


def paired_cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Mean cosine similarity of row i of `first` and row i of `second`, both (n, dim); in -1..1.

    This is the paper's main measure of alignment (0.52 before and 0.89 after alignment on COCO).
    """
    first, second = l2_normalize(first, "first"), l2_normalize(second, "second")
    check_pairs(first, second, "first and second")
    return float((first * second).sum(axis=1).mean())


def token_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Mean cosine of each patch token and its best match in the paired image, in both directions; in -1..1.

    The images of a pair share a caption but not a layout, so tokens at equal positions are not comparable.

    Args:
        first, second: (n, tokens, dim) patch tokens; images with the same index are pairs.

    Raises:
        ValueError: wrong shape, or invalid tokens (the error gives the row).
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 3 or second.ndim != 3 or len(first) != len(second):
        raise ValueError(f"patch tokens must have shape (n, tokens, dim), got {first.shape} and {second.shape}")
    first, second = (
        l2_normalize(tokens.reshape(-1, tokens.shape[-1]), name).reshape(tokens.shape)
        for tokens, name in ((first, "first"), (second, "second"))
    )
    similarity = first @ second.transpose(0, 2, 1)  # (n, tokens, tokens)
    return float((similarity.max(axis=2).mean() + similarity.max(axis=1).mean()) / 2)


def centroid_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Euclidean distance between the means of the L2-normalised embeddings, (n, dim) and (m, dim); in 0..2."""
    first, second = l2_normalize(first, "first"), l2_normalize(second, "second")
    check_same_dim(first, second, "first and second")
    return float(np.linalg.norm(first.mean(axis=0) - second.mean(axis=0)))


def separability(
    generated: np.ndarray, real: np.ndarray, seed: int = 0, folds: int = 5, image_ids: np.ndarray | None = None
) -> float:
    """Cross-validated accuracy of a logistic probe between generated and real: 0.5 is chance, 1.0 full separation.

    Embeddings are L2-normalised, then standardised with the training folds and classified by scikit-learn's
    LogisticRegression with C=1. Rows with the same index are in the same fold, so both images of a pair are either
    trained on or tested on. Accuracy is the mean over the two classes, so 0.5 is chance for sets of any size.

    Args:
        generated: (n, dim) embeddings.
        real: (m, dim) embeddings.
        seed: seed of the folds.
        folds: at least 2, at most min(n, m) or the number of different ids.
        image_ids: (n,) ids of the real images, if n = m. All rows of an image are then in the same fold. Needed if a
            real image occurs in several pairs: a probe that was trained on its copy would recognise it.

    Raises:
        ValueError: invalid embeddings, ids of the wrong length, or fewer rows or ids than folds.
        ImportError: scikit-learn is missing.
    """
    generated, real = l2_normalize(generated, "generated"), l2_normalize(real, "real")
    check_same_dim(generated, real, "generated and real")
    rows = np.arange(max(len(generated), len(real)))
    if image_ids is not None:
        check_pairs(generated, real, "generated and real")
        image_ids = check_labels(image_ids, len(real), "image_ids")
        _, first, codes = np.unique(image_ids, return_index=True, return_inverse=True)
        rows = first.argsort().argsort()[codes]  # numbered by their first rows
    count = rows.max() + 1
    common = min(len(generated), len(real), count)
    if not 2 <= folds <= common:
        raise ValueError(f"folds must be in 2..{common}, the number of images in the smaller set, got {folds}")
    # Shuffled over the rows that both sets have, so that each fold contains rows of both.
    rng = np.random.default_rng(seed)
    fold_of_row = (np.concatenate([rng.permutation(common), np.arange(common, count)]) % folds)[rows]
    fold = np.concatenate([fold_of_row[: len(generated)], fold_of_row[: len(real)]])
    points = np.concatenate([generated, real])
    is_real = np.repeat([False, True], [len(generated), len(real)])
    hit = np.zeros(len(points), dtype=bool)
    for k in range(folds):
        probe = standardized_regression(max_iter=1000, class_weight="balanced")
        probe.fit(points[fold != k], is_real[fold != k])
        hit[fold == k] = probe.predict(points[fold == k]) == is_real[fold == k]
    return float((hit[is_real].mean() + hit[~is_real].mean()) / 2)


def alignment_metrics(
    gen_embeds: np.ndarray,
    real_embeds: np.ndarray,
    caption_ids: np.ndarray | None = None,
    image_ids: np.ndarray | None = None,
) -> dict[str, float]:
    """The alignment metrics of held-out pairs that a trainer logs.

    Args:
        gen_embeds: (n, dim) f_g(x_g), or f_r(x_g) for the state before alignment.
        real_embeds: (n, dim) f_r(x_r); row i is the partner of row i of `gen_embeds`.
        caption_ids: (n,) ids of any dtype. Pairs with the same caption are correct answers for each other, as in the
            loss.
        image_ids: (n,) ids of the real images. Needed if a real image occurs in several pairs (COCO has five captions
            per image): it then counts once among the answers, and is right for the captions of all its pairs.

    Returns:
        paired_cosine, gen_to_real_R@1, gen_to_real_R@5, gen_to_real_R@10 (0..1) and centroid_distance (0..2).

    Raises:
        ValueError: invalid embeddings (the error gives the row), or ids of the wrong length.
    """
    gen_embeds, real_embeds = l2_normalize(gen_embeds, "gen_embeds"), l2_normalize(real_embeds, "real_embeds")
    check_pairs(gen_embeds, real_embeds, "gen_embeds and real_embeds")
    recalls = recall_at_k(gen_to_real_ranks(gen_embeds, real_embeds, caption_ids, image_ids))
    return {
        "paired_cosine": paired_cosine(gen_embeds, real_embeds),
        **{f"gen_to_real_{name}": value for name, value in recalls.items()},
        "centroid_distance": centroid_distance(gen_embeds, real_embeds),
    }


def gen_to_real_ranks(
    gen_embeds: np.ndarray,
    real_embeds: np.ndarray,
    caption_ids: np.ndarray | None = None,
    image_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Rank of the nearest correct real image of each generated image, (n,) int64, from 1 to the number of real images.

    Arguments and errors are as in [`alignment_metrics`].
    """
    for name, given in (("caption_ids", caption_ids), ("image_ids", image_ids)):
        if given is not None and np.shape(given) != (len(gen_embeds),):
            raise ValueError(f"{name} must have shape ({len(gen_embeds)},), got {np.shape(given)}")
    own = np.arange(len(gen_embeds)) if image_ids is None else np.asarray(image_ids).astype(str)
    _, first, own = np.unique(own, return_index=True, return_inverse=True)
    ids = [(own, np.arange(len(first)))]
    if caption_ids is not None:
        codes = np.unique(np.asarray(caption_ids).astype(str), return_inverse=True)[1]
        images, captions = np.unique(np.stack([own, codes], axis=1), axis=0).T  # sorted by image
        places = np.arange(len(images)) - np.searchsorted(images, images)
        written = np.full((len(first), places.max() + 1), -1)  # the captions of each image, then -1
        written[images, places] = captions
        ids += [(codes, column) for column in written.T]
    queries, gallery = (np.stack(columns, axis=1) for columns in zip(*ids, strict=True))
    return retrieval_ranks(gen_embeds, real_embeds[first], queries, gallery)
