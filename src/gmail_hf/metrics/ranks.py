"""Cross-modal retrieval. Ties count against the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._checks import UnitRows, blocks, check_same_dim

# Similarities that differ by less count as ties. It is about the resolution of float32 near 1.0.
TIE_TOLERANCE = 1e-7


def ranks_from_similarity(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank of each query's best relevant target; the best rank is 1.

    An irrelevant target that ties with the best relevant one is ranked before it. A collapsed model, whose
    similarities are all equal, therefore gets the worst ranks. Sorting could give it the best ones by chance.

    Args:
        similarity: (n, m) floats, larger is closer.
        relevant: (n, m) bools with at least one True per row. If a query has several relevant targets, its best one
            counts, as in CLIP's Recall@K for five captions per image.

    Returns:
        (n,) int64 ranks in 1..m.

    Raises:
        ValueError: shapes differ, a similarity is NaN or infinite, or a query has no relevant target.
    """
    similarity, relevant = np.asarray(similarity, dtype=np.float64), np.asarray(relevant, dtype=bool)
    if similarity.ndim != 2 or similarity.shape != relevant.shape:
        raise ValueError(
            f"similarity and relevant must have the same shape (n, m), got {similarity.shape} and {relevant.shape}"
        )
    if similarity.size == 0:
        raise ValueError(f"similarity is empty (shape {similarity.shape}); pass at least one query and one target")
    bad = np.flatnonzero(~np.isfinite(similarity).all(axis=1))
    if len(bad):
        raise ValueError(f"similarity has NaN or infinite values, first in row {bad[0]}; check that embedding")
    lost = np.flatnonzero(~relevant.any(axis=1))
    if len(lost):
        raise ValueError(f"query {lost[0]} has no relevant target; drop it or check the ids")
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)  # (n, 1)
    return 1 + ((similarity >= best - TIE_TOLERANCE) & ~relevant).sum(axis=1)


def retrieval_ranks(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_ids: np.ndarray | None = None,
    gallery_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Rank of each query's best relevant gallery entry by cosine similarity.

    Similarities are computed block by block. Besides the embeddings, memory holds a few numbers per row. Time grows
    with n times m.

    Args:
        queries: (n, dim) embeddings, normalised here.
        gallery: (m, dim) embeddings.
        query_ids, gallery_ids: (n,) and (m,) ids. An entry is relevant if its id equals the query's. Shapes (n, k) and
            (m, k) give each row k ids, such as image id and caption id; one equal id is enough. Without ids, row i of
            `gallery` is the only entry relevant to row i of `queries`.

    Returns:
        (n,) int64 ranks in 1..m; see `ranks_from_similarity` for ties.

    Raises:
        ValueError: invalid embeddings (the error gives the row), different sizes without ids, or a query without a
            relevant entry.
    """
    queries, gallery = UnitRows(queries, "queries"), UnitRows(gallery, "gallery")
    check_same_dim(queries, gallery, "queries and gallery")
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("pass both query_ids and gallery_ids, or neither")
    if query_ids is None:
        if len(queries) != len(gallery):
            raise ValueError(
                f"without ids, queries and gallery must have the same number of rows, got {len(queries)} and "
                f"{len(gallery)}; pass ids for both"
            )
        query_ids, gallery_ids = np.arange(len(queries)), np.arange(len(gallery))
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    for ids, size, name in ((query_ids, len(queries), "query_ids"), (gallery_ids, len(gallery), "gallery_ids")):
        if ids.ndim not in (1, 2) or len(ids) != size:
            raise ValueError(f"{name} must have shape ({size},) or ({size}, k), got {ids.shape}")
    query_ids, gallery_ids = query_ids.reshape(len(queries), -1), gallery_ids.reshape(len(gallery), -1)
    if query_ids.shape[1] != gallery_ids.shape[1]:
        raise ValueError(
            "query_ids and gallery_ids must have the same number of ids per row, "
            f"got {query_ids.shape[1]} and {gallery_ids.shape[1]}"
        )
    return unit_ranks(queries, gallery, [*zip(query_ids.T, gallery_ids.T, strict=True)])[0]


def image_text_ranks(
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    image_ids: np.ndarray,
    caption_ids: np.ndarray | None = None,
    text_image_ids: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The ranks from which `image_text_retrieval` computes its scores. `ranks <= k` are the hits of Recall@K.

    Args:
        image_embeds, text_embeds, image_ids, caption_ids, text_image_ids: as in `image_text_retrieval`.

    Returns:
        {"image_to_text": (images,), "text_to_image": (captions,)} int64 ranks from 1. Images are in the order of
        their first rows, captions in the given order.

    Raises:
        ValueError: as `image_text_retrieval`.
    """
    images, texts = UnitRows(image_embeds, "image_embeds"), UnitRows(text_embeds, "text_embeds")
    check_same_dim(images, texts, "image_embeds and text_embeds")
    image_ids = np.asarray(image_ids)
    row_by_row = text_image_ids is None
    text_image_ids = image_ids if row_by_row else np.asarray(text_image_ids)
    if text_image_ids.shape != (len(texts),):
        raise ValueError(f"ids must have shape ({len(texts)},), one per caption, got {text_image_ids.shape}")
    if image_ids.shape != (len(images),):
        raise ValueError(
            f"image_ids must have shape ({len(images)},), one per row of image_embeds, got {image_ids.shape}"
        )
    first = np.sort(np.unique(image_ids, return_index=True)[1])  # one row per image
    ids = [(image_ids[first], text_image_ids)]
    both = ("image", image_ids[first]), ("caption", text_image_ids)
    for (name, own), (partner, theirs) in (both, both[::-1]):
        lost = np.flatnonzero(~np.isin(own, theirs))
        if len(lost):
            raise ValueError(f"{name} {lost[0]} (image id {own[lost[0]]}) has no {partner}; drop it or check the ids")
    if caption_ids is not None:
        caption_ids = np.asarray(caption_ids)
        if caption_ids.shape != (len(texts),):
            raise ValueError(f"ids must have shape ({len(texts)},), one per caption, got {caption_ids.shape}")
        if not row_by_row or len(first) < len(texts):
            raise ValueError("caption_ids require exactly one caption per image, row by row; leave out caption_ids")
        ids.append((caption_ids, caption_ids))
    if len(first) < len(images):
        images = UnitRows(images.array[first], "image_embeds")
    image_to_text, text_to_image = unit_ranks(images, texts, ids)
    return {"image_to_text": image_to_text, "text_to_image": text_to_image}


def image_text_retrieval(
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    image_ids: np.ndarray,
    caption_ids: np.ndarray | None = None,
    ks: Sequence[int] = (1, 5, 10),
    text_image_ids: np.ndarray | None = None,
) -> dict[str, float]:
    """Recall@K, as in CLIP's paper, and median ranks of image-to-text and text-to-image retrieval.

    Args:
        image_embeds: (n, dim) embeddings; row i is the image of caption i. An image with five captions has five rows
            and counts once.
        text_embeds: (n, dim) embeddings of the captions.
        image_ids: (n,) ids of any dtype, equal for rows of the same image.
        caption_ids: (n,) ids, if each image has one caption: captions with the same id, and their images, are correct
            answers for each other. CLIP's convention does not use them.
        ks: values of K.
        text_image_ids: (m,) ids of the images of m captions. With them, `image_embeds` has one row per image and
            `image_ids` are the (n,) ids of these rows.

    Returns:
        {"image_to_text_R@1": ..., "image_to_text_median_rank": ..., "text_to_image_R@1": ..., ...}: recalls in 0..1,
        median ranks from 1; see `ranks_from_similarity` for ties.

    Raises:
        ValueError: invalid embeddings (the error gives the row), ids of the wrong length, an image without caption or
            a caption without image, or caption_ids if an image has several captions.
    """
    scores = {}
    ranks = image_text_ranks(image_embeds, text_embeds, image_ids, caption_ids, text_image_ids)
    for way, values in ranks.items():
        scores |= {f"{way}_{name}": value for name, value in recall_at_k(values, ks).items()}
        scores[f"{way}_median_rank"] = float(np.median(values))
    return scores


def recall_at_k(ranks: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries whose best relevant target is among the first K: {"R@1": ..., ...}, each in 0..1.

    Raises:
        ValueError: no ranks, a rank below 1, or a K below 1.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or len(ranks) == 0 or ranks.min() < 1:
        raise ValueError("ranks must be a non-empty vector of integers of at least 1, see `retrieval_ranks`")
    if any(k < 1 for k in ks):
        raise ValueError(f"every K must be at least 1, got {tuple(ks)}")
    return {f"R@{k}": float((ranks <= k).mean()) for k in ks}


def unit_ranks(
    queries: UnitRows, gallery: UnitRows, ids: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks in both directions from one pass over the similarities: (n,) of the queries, (m,) of the gallery entries.

    `ids` has one pair of (n,) and (m,) ids per kind of id. A query without a relevant entry raises a ValueError. A
    gallery entry that is relevant to no query gets rank n + 1.
    """
    codes = [_codes(*pair) for pair in ids]
    best = _best_relevant(queries, gallery, codes)
    lost = np.flatnonzero(np.isneginf(best[0]))
    if len(lost):
        raise ValueError(f"query {lost[0]} has no relevant gallery entry; drop it or check the ids")
    ranks = np.ones(len(queries), np.int64), np.ones(len(gallery), np.int64)
    for rows in blocks(np.arange(len(queries))):
        left = queries[rows]
        left32 = left.astype(np.float32)
        for columns in blocks(np.arange(len(gallery))):
            right = gallery[columns]
            similarity = left32 @ right.astype(np.float32).T  # (rows, columns)
            relevant = np.zeros(similarity.shape, dtype=bool)
            for query_codes, gallery_codes in codes:
                relevant |= query_codes[rows, None] == gallery_codes[columns]
            ranks[0][rows] += _ahead(similarity, relevant, best[0][rows], left, right)
            ranks[1][columns] += _ahead(similarity.T, relevant.T, best[1][columns], right, left)
    return ranks


def _ahead(
    similarity: np.ndarray, relevant: np.ndarray, best: np.ndarray, queries: np.ndarray, gallery: np.ndarray
) -> np.ndarray:
    """Number of irrelevant entries before each query's best relevant one, (rows,).

    Similarities that are too close for float32's rounding error are computed again in float64.
    """
    bar = best[:, None] - TIE_TOLERANCE
    # Bound for a sum of dim products in any order (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1),
    # plus 4 for the rounding of the rows and of the bar.
    error = (queries.shape[1] + 4) * np.finfo(np.float32).eps / 2
    ahead = similarity >= (bar - error).astype(np.float32)
    ahead &= ~relevant
    close = similarity <= (bar + error).astype(np.float32)
    close &= ahead
    rows, columns = np.divmod(np.flatnonzero(close), close.shape[1])  # as np.nonzero, faster
    if len(rows) <= len(queries) + len(gallery):
        ahead[rows, columns] = np.einsum("ij,ij->i", queries[rows], gallery[columns]) >= bar[rows, 0]
    else:  # The model has nearly collapsed: single products would need more time and memory than the complete block.
        ahead[close] = (queries @ gallery.T >= bar)[close]
    return ahead.sum(axis=1, dtype=np.int32)


def _best_relevant(
    queries: UnitRows, gallery: UnitRows, codes: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Best relevant similarity in float64 of each query (n,) and each gallery entry (m,); -inf if there is none.

    Only rows with equal codes are compared, which costs little compared with all similarities.
    """
    best = np.full(len(queries), -np.inf), np.full(len(gallery), -np.inf)
    for pair in codes:
        orders = [np.argsort(code, kind="stable") for code in pair]
        shared = np.intersect1d(*pair)
        ends = [
            [np.searchsorted(code[order], shared, side) for side in ("left", "right")]
            for code, order in zip(pair, orders, strict=True)
        ]
        for i in range(len(shared)):
            groups = [order[start[i] : end[i]] for order, (start, end) in zip(orders, ends, strict=True)]
            for rows in blocks(groups[0]):
                for columns in blocks(groups[1]):
                    similarity = queries[rows] @ gallery[columns].T
                    best[0][rows] = np.maximum(best[0][rows], similarity.max(axis=1))
                    best[1][columns] = np.maximum(best[1][columns], similarity.max(axis=0))
    return best


def _codes(query_ids: np.ndarray, gallery_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encode ids of any dtype as integers, (n,) and (m,), which are cheap to compare."""
    codes = np.unique(np.concatenate([query_ids, gallery_ids]), return_inverse=True)[1].astype(np.int32)
    return codes[: len(query_ids)], codes[len(query_ids) :]
