"""Decides from arrays which generated images to leave out: copies, wrong captions, all but the best of a caption."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics._checks import blocks
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
    DUPLICATE: "near-duplicate of another image",
    NOT_BEST: "not among the best of its caption",
}


def nearest_above(embeds: np.ndarray, others: np.ndarray, threshold: float) -> np.ndarray:
    """
    For each embedding, find the nearest of `others` whose cosine is at least `threshold`.

    All pairs are compared, block by block: time grows with n times m, memory does not.

    Args:
        embeds, others: `(n, dim)` and `(m, dim)`, L2-normalised.
        threshold: a cosine.

    Returns:
        `(n,)` row numbers of `others`, or -1 if none is near enough.
    """
    nearest, cosines = np.full(len(embeds), -1), np.full(len(embeds), -np.inf, embeds.dtype)
    for rows in blocks(np.arange(len(embeds))):
        for columns in blocks(np.arange(len(others))):
            similarity = embeds[rows] @ others[columns].T
            best = similarity.max(axis=1)
            nearer = best > cosines[rows]
            nearest[rows[nearer]] = columns[similarity[nearer].argmax(axis=1)]
            cosines[rows] = np.maximum(cosines[rows], best)
    return np.where(cosines >= threshold, nearest, -1)


def near_duplicates(embeds: np.ndarray, threshold: float) -> np.ndarray:
    """
    Find images that are nearly equal to an earlier image that is kept.

    Each image is compared with all earlier ones that are kept, block by block: time grows with the square of the
    number of images, memory does not.

    Args:
        embeds: `(n, dim)`, L2-normalised, in order of preference: of two near-duplicates, the first one is kept.
        threshold: images with at least this cosine are near-duplicates.

    Returns:
        `(n,)` the row of the image that is duplicated, or -1 for images to keep.
    """
    copy_of = np.full(len(embeds), -1)
    kept = np.zeros(0, int)
    for rows in blocks(np.arange(len(embeds))):
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
        kept = np.concatenate([kept, rows[new]])
    return copy_of


def mismatched_scores(images: np.ndarray, texts: np.ndarray, captions: Sequence[Any], seed: int = 0) -> np.ndarray:
    """
    Compute CLIPScores of images with wrong captions: the caption of an image drawn at random among those with another
    caption.

    Args:
        images, texts: `(n, dim)` embeddings of images and of their captions.
        captions: `(n,)` captions or their ids.
        seed: seed of the drawn captions.

    Returns:
        `(n,)` float64, or an empty array if all captions are equal.
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
    Decide which generated images to keep.

    The reasons are tried in the order of `IN_WORDS`. An image is left out for the first one that applies. Later
    reasons are only tried on images that are still kept.

    Args:
        states: `(n,)` `UNREADABLE`, `CONSTANT` or None.
        embeds: `(n, dim)` embeddings, L2-normalised. Rows of images with a state are ignored.
        real: `(m, dim)` embeddings of real images by the same model, all of them finite.
        scores: `(n,)` CLIPScore of each image with its caption. The near-duplicate with the highest score is kept, or
            without scores the first one.
        captions: `(n,)` captions or their ids, for `best_k`.
        first_rows: `(n,)` the first row with the same image, for rows that repeat an image on purpose. Such rows are
            not duplicates of each other.
        duplicate_threshold: images with at least this cosine are copies.
        min_clip_score: leave out images with a lower score. None keeps all.
        best_k: number of images to keep for each caption, those with the highest scores. None keeps all.

    Returns:
        `(n,)` the reason for leaving out each image, or None; and `(n,)` the row that it copies, which is a row of
        `real` for `REAL_COPY`, or -1 if it is no copy.
    """
    reasons: list[str | None] = list(states)
    copy_of = np.full(len(reasons), -1)
    first = np.arange(len(reasons)) if first_rows is None else first_rows
    ranking = np.zeros(len(reasons)) if scores is None else scores

    def left() -> np.ndarray:
        """Return the rows that are still kept, by descending score."""
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
