"""Cross-modal retrieval with ties counted against the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._checks import check_same_dim, l2_normalize

# Similarities closer than float32 can tell apart near 1.0 are one value: rounding must not break a tie in our favour.
TIE_TOLERANCE = 1e-7
# 16 million float64 similarities at a time: 128 MiB.
MAX_BLOCK = 2**24


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
    """Rank of each query's best relevant gallery entry by cosine similarity, computed block by block.

    Args:
        queries: (n, dim) embeddings, any length (normalised here).
        gallery: (m, dim) embeddings.
        query_ids, gallery_ids: (n,) and (m,) ids; an entry is relevant when the ids are equal. (n, k) and (m, k) give
            k ids a row, of which one equal pair suffices (say, image id and caption id). Both absent: row i of
            `queries` belongs to row i of `gallery`.

    Returns:
        (n,) int64 ranks in 1..m; see `ranks_from_similarity` for ties.

    Raises:
        ValueError: invalid embeddings (the row is named), unequal sizes without ids, a query without a relevant entry.
    """
    queries, gallery = l2_normalize(queries, "queries"), l2_normalize(gallery, "gallery")
    check_same_dim(queries, gallery, "queries and gallery")
    if (query_ids is None) != (gallery_ids is None):
        raise ValueError("give both query_ids and gallery_ids, or neither")
    if query_ids is None:
        if len(queries) != len(gallery):
            raise ValueError(
                f"{len(queries)} queries and {len(gallery)} gallery entries do not pair row by row; give ids for both"
            )
        query_ids, gallery_ids = np.arange(len(queries)), np.arange(len(gallery))
    query_codes, gallery_codes = _codes(query_ids, len(queries), gallery_ids, len(gallery))
    step = max(1, MAX_BLOCK // len(gallery))
    ranks = []
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        relevant = np.zeros((len(queries[block]), len(gallery)), dtype=bool)
        for query_code, gallery_code in zip(query_codes, gallery_codes, strict=True):
            relevant |= query_code[block, None] == gallery_code[None, :]
        lost = np.flatnonzero(~relevant.any(axis=1))
        if len(lost):
            raise ValueError(f"query {start + lost[0]} has no relevant gallery entry; drop it or check the ids")
        ranks.append(ranks_from_similarity(queries[block] @ gallery.T, relevant))
    return np.concatenate(ranks)


def image_text_retrieval(
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    image_ids: np.ndarray,
    caption_ids: np.ndarray | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@K of captions by images and of images by captions, as CLIP's paper reports it.

    Args:
        image_embeds: (n, dim) embeddings, row i the image of caption i; an image with five captions stands in five
            rows and counts once.
        text_embeds: (n, dim) embeddings of the captions.
        image_ids: (n,) ids of any dtype, equal for rows of one image.
        caption_ids: (n,) ids, for images of one caption each: captions of equal id, and their images, are right
            answers for each other. CLIP's convention has none.
        ks: the Ks.

    Returns:
        {"image_to_text_R@1": ..., "text_to_image_R@1": ..., ...}, each in 0..1; see `retrieval_ranks` for ties.

    Raises:
        ValueError: invalid embeddings (the row is named), ids of another length, caption_ids although an image has
            several captions.
    """
    ids = [np.asarray(image_ids).astype(str)]
    if caption_ids is not None:
        ids.append(np.asarray(caption_ids).astype(str))
    for values in ids:
        if values.shape != (len(text_embeds),):
            raise ValueError(f"ids must have shape ({len(text_embeds)},), one a caption, got {values.shape}")
    captions = np.stack(ids, axis=1)  # (n, kinds of id)
    first = np.unique(ids[0], return_index=True)[1]  # one row an image
    images = captions[first]
    if caption_ids is not None and len(first) < len(captions):
        raise ValueError("caption_ids are for images of one caption each, here an image has several; leave them out")
    ranks = {
        "image_to_text": retrieval_ranks(image_embeds[first], text_embeds, images, captions),
        "text_to_image": retrieval_ranks(text_embeds, image_embeds[first], captions, images),
    }
    return {f"{name}_{k}": value for name, values in ranks.items() for k, value in recall_at_k(values, ks).items()}


def _codes(query_ids: np.ndarray, n: int, gallery_ids: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of any dtype as integer codes, (k, n) and (k, m), so that comparing a block is cheap."""
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    for ids, size, name in ((query_ids, n, "query_ids"), (gallery_ids, m, "gallery_ids")):
        if ids.ndim not in (1, 2) or len(ids) != size:
            raise ValueError(f"{name} must have shape ({size},) or ({size}, k), got {ids.shape}")
    query_ids, gallery_ids = query_ids.reshape(n, -1), gallery_ids.reshape(m, -1)
    if query_ids.shape[1] != gallery_ids.shape[1]:
        raise ValueError(f"query_ids and gallery_ids have {query_ids.shape[1]} and {gallery_ids.shape[1]} ids a row")
    both = np.concatenate([query_ids, gallery_ids])
    codes = np.stack([np.unique(column, return_inverse=True)[1] for column in both.T])
    return codes[:, :n], codes[:, n:]


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
