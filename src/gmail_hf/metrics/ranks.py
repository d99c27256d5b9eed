"""Cross-modal retrieval with ties counted against the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ._checks import UnitRows, check_same_dim

# Similarities closer than float32 can tell apart near 1.0 are one value: rounding must not break a tie in our favour.
TIE_TOLERANCE = 1e-7
# Rows and columns of similarities at a time: 4 MiB in float32, whatever the sizes of the sets.
BLOCK = 1024


def ranks_from_similarity(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank of each query's best relevant target, 1 being first.

    A target that is not relevant and ties with the best relevant one is ranked before it: a collapsed model, for
    which all similarities are equal, gets the worst rank there is. (Sorting would give it the best rank by luck.)

    Args:
        similarity: (n, m) floats, larger is closer.
        relevant: (n, m) bools, at least one True a row. A query with several relevant targets is judged by its best
            one, the convention of CLIP's Recall@K for five captions an image.

    Returns:
        (n,) int64 ranks in 1..m.

    Raises:
        ValueError: shapes differ, a similarity is NaN or infinite, or a query has no relevant target.
    """
    similarity, relevant = np.asarray(similarity, dtype=np.float64), np.asarray(relevant, dtype=bool)
    if similarity.ndim != 2 or similarity.shape != relevant.shape:
        raise ValueError(f"similarity and relevant must be (n, m) both, got {similarity.shape} and {relevant.shape}")
    if similarity.size == 0:
        raise ValueError(f"similarity is empty (shape {similarity.shape}); give at least one query and one target")
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

    It works block by block: beyond the embeddings it holds a few numbers a row, and its time grows with n times m.

    Args:
        queries: (n, dim) embeddings, any length (normalised here).
        gallery: (m, dim) embeddings.
        query_ids, gallery_ids: (n,) and (m,) ids; an entry is relevant when the ids are equal. (n, k) and (m, k) give
            k ids per row (say, image id and caption id); one equal id suffices. Both absent: row i of
            `queries` belongs to row i of `gallery`.

    Returns:
        (n,) int64 ranks in 1..m; see `ranks_from_similarity` for ties.

    Raises:
        ValueError: invalid embeddings (the row is named), unequal sizes without ids, a query without a relevant entry.
    """
    queries, gallery = UnitRows(queries, "queries"), UnitRows(gallery, "gallery")
    check_same_dim(queries, gallery, "queries and gallery")
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("give both query_ids and gallery_ids, or neither")
    if query_ids is None:
        if len(queries) != len(gallery):
            raise ValueError(
                f"{len(queries)} queries and {len(gallery)} gallery entries do not pair row by row; give ids for both"
            )
        query_ids, gallery_ids = np.arange(len(queries)), np.arange(len(gallery))
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    for ids, size, name in ((query_ids, len(queries), "query_ids"), (gallery_ids, len(gallery), "gallery_ids")):
        if ids.ndim not in (1, 2) or len(ids) != size:
            raise ValueError(f"{name} must have shape ({size},) or ({size}, k), got {ids.shape}")
    query_ids, gallery_ids = query_ids.reshape(len(queries), -1), gallery_ids.reshape(len(gallery), -1)
    if query_ids.shape[1] != gallery_ids.shape[1]:
        raise ValueError(f"query_ids and gallery_ids have {query_ids.shape[1]} and {gallery_ids.shape[1]} ids a row")
    return unit_ranks(queries, gallery, [*zip(query_ids.T, gallery_ids.T, strict=True)])[0]


def image_text_ranks(
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    image_ids: np.ndarray,
    caption_ids: np.ndarray | None = None,
    text_image_ids: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The ranks behind `image_text_retrieval`, item by item; `ranks <= k` are the hits of Recall@K.

    Args:
        image_embeds, text_embeds, image_ids, caption_ids, text_image_ids: as in `image_text_retrieval`.

    Returns:
        {"image_to_text": (images,), "text_to_image": (captions,)} int64 ranks from 1. Images are in the order of
        their first rows, captions as given.

    Raises:
        ValueError: as `image_text_retrieval`.
    """
    images, texts = UnitRows(image_embeds, "image_embeds"), UnitRows(text_embeds, "text_embeds")
    check_same_dim(images, texts, "image_embeds and text_embeds")
    image_ids = np.asarray(image_ids)
    row_by_row = text_image_ids is None
    text_image_ids = image_ids if row_by_row else np.asarray(text_image_ids)
    if text_image_ids.shape != (len(texts),):
        raise ValueError(f"ids must have shape ({len(texts)},), one a caption, got {text_image_ids.shape}")
    if image_ids.shape != (len(images),):
        raise ValueError(
            f"image_ids must have shape ({len(images)},), one for each row of image_embeds, got {image_ids.shape}"
        )
    first = np.sort(np.unique(image_ids, return_index=True)[1])  # one row an image
    ids = [(image_ids[first], text_image_ids)]
    sides = ("image", ids[0][0]), ("caption", text_image_ids)
    for (name, own), (partner, theirs) in (sides, sides[::-1]):
        lost = np.flatnonzero(~np.isin(own, theirs))
        if len(lost):
            raise ValueError(f"{name} {lost[0]} (image id {own[lost[0]]}) has no {partner}; drop it or check the ids")
    if caption_ids is not None:
        caption_ids = np.asarray(caption_ids)
        if caption_ids.shape != (len(texts),):
            raise ValueError(f"ids must have shape ({len(texts)},), one a caption, got {caption_ids.shape}")
        if not row_by_row or len(first) < len(texts):
            raise ValueError(
                "caption_ids are for images of one caption each, row by row, here an image has several; leave them out"
            )
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
    """Recall@K of captions by images and of images by captions, as CLIP's paper reports it, and median ranks.

    Args:
        image_embeds: (n, dim) embeddings, row i the image of caption i; an image with five captions is in five
            rows and counts once.
        text_embeds: (n, dim) embeddings of the captions.
        image_ids: (n,) ids of any dtype, equal for rows of one image.
        caption_ids: (n,) ids, for images of one caption each: captions of equal id, and their images, are right
            answers for each other. CLIP's convention has none.
        ks: the Ks.
        text_image_ids: (m,) ids, for an `image_embeds` of one row an image: the image of each of m captions, by its
            id in `image_ids`, which are (n,) ids of the images then.

    Returns:
        {"image_to_text_R@1": ..., "image_to_text_median_rank": ..., "text_to_image_R@1": ..., ...}: recalls in 0..1,
        median ranks from 1; see `ranks_from_similarity` for ties.

    Raises:
        ValueError: invalid embeddings (the row is named), ids of another length, an image without caption or a
            caption without image, caption_ids although an image has several captions.
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
        raise ValueError("ranks must be a non-empty vector of integers from 1 up, as retrieval_ranks gives")
    if any(k < 1 for k in ks):
        raise ValueError(f"every K must be at least 1, got {tuple(ks)}")
    return {f"R@{k}": float((ranks <= k).mean()) for k in ks}


def unit_ranks(
    queries: UnitRows, gallery: UnitRows, ids: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks both ways from one pass over the similarities: (n,) of the queries, (m,) of the gallery as queries.

    `ids` are pairs of (n,) and (m,) ids, one pair for each kind of id. A query that has nothing relevant raises a
    ValueError; a gallery entry that is relevant to no query gets rank n + 1.
    """
    codes = [_codes(*pair) for pair in ids]
    best = _best_relevant(queries, gallery, codes)
    lost = np.flatnonzero(np.isneginf(best[0]))
    if len(lost):
        raise ValueError(f"query {lost[0]} has no relevant gallery entry; drop it or check the ids")
    ranks = np.ones(len(queries), np.int64), np.ones(len(gallery), np.int64)
    for rows in _blocks(np.arange(len(queries))):
        left = queries[rows]
        left32 = left.astype(np.float32)
        for columns in _blocks(np.arange(len(gallery))):
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
    """Number of irrelevant entries that come before each query's best relevant one, (rows,).

    float32 similarities decide wherever their rounding error cannot matter, float64 the few that are close.
    """
    bar = best[:, None] - TIE_TOLERANCE
    # Higham, "Accuracy and Stability of Numerical Algorithms", 3.1: a sum of dim products, in any order; 4 for the
    # rounding of the rows and of the bar.
    error = (queries.shape[1] + 4) * np.finfo(np.float32).eps / 2
    ahead = similarity >= (bar - error).astype(np.float32)
    ahead &= ~relevant
    close = similarity <= (bar + error).astype(np.float32)
    close &= ahead
    rows, columns = np.divmod(np.flatnonzero(close), close.shape[1])  # as np.nonzero, faster
    if len(rows) <= len(queries) + len(gallery):
        ahead[rows, columns] = np.einsum("ij,ij->i", queries[rows], gallery[columns]) >= bar[rows, 0]
    else:  # A nearly collapsed model: one by one, all these would take longer and more memory.
        ahead[close] = (queries @ gallery.T >= bar)[close]
    return ahead.sum(axis=1, dtype=np.int32)


def _best_relevant(
    queries: UnitRows, gallery: UnitRows, codes: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Similarity of the best relevant entry in float64, of each query (n,) and each gallery entry (m,); -inf if none.

    Rows of equal code are compared with each other alone, so this costs little compared with all similarities.
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
            for rows in _blocks(groups[0]):
                for columns in _blocks(groups[1]):
                    similarity = queries[rows] @ gallery[columns].T
                    best[0][rows] = np.maximum(best[0][rows], similarity.max(axis=1))
                    best[1][columns] = np.maximum(best[1][columns], similarity.max(axis=0))
    return best


def _codes(query_ids: np.ndarray, gallery_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of any dtype as integer codes, (n,) and (m,), so that comparing a block is cheap."""
    codes = np.unique(np.concatenate([query_ids, gallery_ids]), return_inverse=True)[1].astype(np.int32)
    return codes[: len(query_ids)], codes[len(query_ids) :]


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))
