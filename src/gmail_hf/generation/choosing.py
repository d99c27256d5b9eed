"""Decisions on generated images from arrays: copies, wrong captions, the best of a caption."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics.clip_score import clip_score
from ..training.columns import rows_by_caption

# Why an image is left out, in the order in which the reasons are tried.
UNREADABLE, CONSTANT, REAL_COPY = "unreadable", "constant", "real_copy"
MISMATCH, DUPLICATE, NOT_BEST = "mismatch", "duplicate", "not_best"
IN_WORDS = {
    UNREADABLE: "cannot be read",
    CONSTANT: "all pixels are alike",
    REAL_COPY: "copy of a real image",
    MISMATCH: "caption does not fit",
    DUPLICATE: "near-duplicate of another one",
    NOT_BEST: "not among the best of its caption",
}
BLOCK = 1024  # rows compared at a time


def nearest_above(embeds: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    """
    The nearest of other embeddings, if its cosine is at least `threshold`.

    Args:
        embeds, others: `(n, dim)` and `(m, dim)`, L2-normalised.
        threshold: a cosine.

    Returns:
        `(n,)` row numbers of `others`; -1 where none is near enough.
    """
    nearest = np.full(len(embeds), -1)
    for start in range(0, len(embeds) if len(others) else 0, BLOCK):
        similarity = embeds[start : start + BLOCK] @ others.T
        best = similarity.argmax(axis=1)
        near = np.take_along_axis(similarity, best[:, None], axis=1)[:, 0] >= threshold
        nearest[start : start + BLOCK] = np.where(near, best, -1)
    return nearest


def near_duplicates(embeds: np.ndarray, threshold: float, order: np.ndarray | None = None) -> np.ndarray:
    """
    Images that are nearly equal to one that is kept: every image is compared with all kept ones before it.

    Args:
        embeds: `(n, dim)`, L2-normalised.
        threshold: the cosine from which on two images are near-duplicates.
        order: `(n,)` row numbers, those to keep rather first; by default as they are.

    Returns:
        `(n,)` the row that an image duplicates; -1 for images to keep.
    """
    order = np.arange(len(embeds)) if order is None else order
    copy_of = np.full(len(embeds), -1)
    kept: list[int] = []
    for start in range(0, len(order), BLOCK):
        rows = order[start : start + BLOCK]
        earlier = nearest_above(embeds[rows], embeds[kept], threshold)
        within = embeds[rows] @ embeds[rows].T
        new: list[int] = []
        for i, row in enumerate(rows):
            near = [j for j in new if within[i, j] >= threshold]
            if earlier[i] >= 0:
                copy_of[row] = kept[earlier[i]]
            elif near:
                copy_of[row] = rows[max(near, key=lambda j: within[i, j])]
            else:
                new.append(i)
        kept += rows[new].tolist()
    return copy_of


def mismatched_scores(images: np.ndarray, texts: np.ndarray, captions: Sequence[Any], seed: int = 0) -> np.ndarray:
    """
    CLIPScores of images with the caption of another image, drawn at random among those with another caption.

    Args:
        images, texts: `(n, dim)` embeddings, row i of both of one image.
        captions: `(n,)` captions or their ids.
        seed: of the draw.

    Returns:
        `(n,)` float64; empty if all captions are equal.
    """
    groups = rows_by_caption(captions)
    if len(groups) < 2:
        return np.zeros(0)
    order = np.concatenate(list(groups.values()))
    starts = np.cumsum([0, *map(len, groups.values())])
    other = np.empty(len(order), int)
    rng = np.random.default_rng(seed)
    for rows, start, end in zip(groups.values(), starts, starts[1:], strict=False):
        draws = rng.integers(len(order) - len(rows), size=len(rows))
        other[rows] = order[np.where(draws < start, draws, draws + end - start)]
    return clip_score(images, texts[other])


def choose(
    states: Sequence[str | None],
    embeds: np.ndarray,
    real: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    captions: Sequence[Any] = (),
    first_rows: np.ndarray | None = None,
    duplicate_threshold: float = 0.98,
    min_clip_score: float | None = None,
    best_k: int | None = None,
) -> tuple[list[str | None], np.ndarray]:
    """
    Decide which generated images to keep. An image has the first reason of `IN_WORDS` that holds; later rules compare
    with images that earlier ones keep.

    Args:
        states: `(n,)` `UNREADABLE`, `CONSTANT` or None.
        embeds: `(n, dim)` embeddings, L2-normalised; rows of images with a state are not looked at.
        real: `(m, dim)` embeddings of real images in the same space, without missing ones.
        scores: `(n,)` CLIPScore of each image with its caption. Of near-duplicates, the one with the highest score is
            kept; without scores the first one.
        captions: `(n,)` captions or their ids, for `best_k`.
        first_rows: `(n,)` for a row that repeats an image of an earlier row, that row; otherwise the row itself.
            Such rows are not duplicates of each other.
        duplicate_threshold: cosine from which on an image is a copy of another one.
        min_clip_score: images below it are a mismatch; None keeps all.
        best_k: keep this many images of each caption, those with the highest scores; None keeps all.

    Returns:
        `(n,)` the reason to leave an image out, or None; and `(n,)` the row that it copies, a row of `real` for
        `REAL_COPY`, -1 for other reasons.
    """
    reasons: list[str | None] = list(states)
    copy_of = np.full(len(reasons), -1)
    first = np.arange(len(reasons)) if first_rows is None else first_rows
    ranking = np.zeros(len(reasons)) if scores is None else scores

    def left() -> np.ndarray:
        """Rows without a reason, the best first."""
        rows = np.array([row for row, reason in enumerate(reasons) if reason is None], int)
        return rows[np.argsort(-ranking[rows], kind="stable")]

    def leave_out(rows: np.ndarray, reason: str, copies: np.ndarray | None = None) -> None:
        for row in rows:
            reasons[row] = reason
        if copies is not None:
            copy_of[rows] = copies

    if real is not None:
        rows = left()
        nearest = nearest_above(embeds[rows], real, duplicate_threshold)
        leave_out(rows[nearest >= 0], REAL_COPY, nearest[nearest >= 0])
    if min_clip_score is not None:
        rows = left()
        leave_out(rows[ranking[rows] < min_clip_score], MISMATCH)
    rows = left()
    images = rows[np.unique(first[rows], return_index=True)[1]]  # one row of each image, the best one
    images = images[np.argsort(-ranking[images], kind="stable")]
    found = near_duplicates(embeds[images], duplicate_threshold)
    copies = {first[row]: images[copy] for row, copy in zip(images, found, strict=True) if copy >= 0}
    repeats = np.array([row for row in rows if first[row] in copies], int)
    leave_out(repeats, DUPLICATE, np.array([copies[first[row]] for row in repeats], int))
    if best_k is not None:
        rows = left()
        for places in rows_by_caption([captions[row] for row in rows]).values():
            of_caption = rows[places]
            best = list(dict.fromkeys(first[of_caption]))[:best_k]
            leave_out(of_caption[~np.isin(first[of_caption], best)], NOT_BEST)
    return reasons, copy_of
