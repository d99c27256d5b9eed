"""Finds generated images to leave out: broken, constant, copied and wrongly captioned ones, and all but the best."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from PIL import ImageStat

from ..metrics.clip_score import clip_score
from ..training.columns import paths_of
from ..training.data import BadImageError, caption_ids, decode_image, undecoded
from ..training.decoding import digest_of
from ..training.embeddings import cache_key, cached_embeds, embed_texts, embeds_array
from .choosing import CONSTANT, IN_WORDS, REAL_COPY, UNREADABLE, choose, mismatched_scores
from .masks import read_all

CONSTANT_DEVIATION = 2.0  # standard deviation of each channel, in units of 0..255
MISMATCHED = 0.95  # share of images with a wrong caption that the default threshold leaves out


def curate(
    model: Any,
    processor: Any,
    dataset: Dataset,
    real_images: Dataset | None = None,
    score_model: Any = None,
    score_processor: Any = None,
    duplicate_threshold: float = 0.98,
    min_clip_score: float | None = None,
    best_k: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[dict[str, Any], pa.Table]:
    """
    Measure generated images and decide which to keep. The data set is not changed.

    All images are compared with each other and with the real images, so time grows with the square of their number.
    Memory holds the embeddings and one block of similarities.

    Args:
        model ([`GmailCLIPModel`] or another model with branches): its `real` branch finds copies.
        processor: its processor.
        dataset: rows with `generated_image` and `caption`, and optionally `image_id` and `real_image`.
        real_images: rows with `real_image`, to find copies of these images. Defaults to those of `dataset`.
        score_model, score_processor: a model with a text encoder, for CLIPScore. Defaults to `model` if it has one.
        duplicate_threshold, best_k: see [`choose`].
        min_clip_score: see [`choose`]. Defaults to the score below which 95 % of the images are with the caption of
            another image.
        batch_size: images per forward pass.
        seed: seed of the drawn captions of other images.

    Returns:
        A summary, and the mask for [`write_mask`]. The summary has `counts`, `dropped` (the number of images by
        reason), `real_images`, `clip_score` (None without scores), and `same_model`: whether the model that finds
        copies also scores.

    Raises:
        ValueError: a threshold is out of range, `best_k` or `min_clip_score` is given without a model that scores, or
            no image can be used.
    """
    if not 0 < duplicate_threshold <= 1:
        raise ValueError(f"duplicate_threshold must be a cosine above 0 and at most 1, got {duplicate_threshold}.")
    if best_k is not None and best_k < 1:
        raise ValueError(f"best_k must be at least 1, got {best_k}.")
    if score_model is None and hasattr(model, "get_text_features"):
        score_model, score_processor = model, processor
    if score_model is None and (best_k, min_clip_score) != (None, None):
        raise ValueError("best_k and min_clip_score need a model with a text encoder: pass one as score_model.")
    images = undecoded(dataset)
    captions = images["caption"][:]
    found = read_all(images, "generated_image", _inspect, "Reading generated images")
    digests, states = ([values[i] for values in found] for i in range(2))
    if not any(state is None for state in states):
        raise ValueError(f"All {len(states)} generated images are {' or '.join(sorted(set(states)))}: check them.")

    def embed(rows: Dataset, column: str, by: Any, its_processor: Any) -> np.ndarray:
        return embeds_array(cached_embeds(rows, column, by, its_processor, "real", batch_size))

    embeds = embed(images, "generated_image", model, processor)
    real = undecoded(real_images) if real_images is not None else images
    real_rows, reals = np.zeros(0, int), None
    if "real_image" in real.column_names:
        reals = embed(real, "real_image", model, processor)
        real_rows = np.flatnonzero(np.isfinite(reals[:, 0]))
        reals = reals[real_rows]
    groups, scores, summary = caption_ids(captions), None, None
    if score_model is not None:
        usable = np.array([state is None for state in states])
        of_images = embed(images, "generated_image", score_model, score_processor)[usable]
        texts, places = np.unique(np.array(captions)[usable], return_inverse=True)
        of_texts = embed_texts(score_model, score_processor.tokenizer, texts.tolist(), desc="Embedding captions")
        scores = np.full(len(states), np.nan)
        scores[usable] = clip_score(of_images, of_texts[places])
        mismatched = mismatched_scores(of_images, of_texts[places], np.array(groups)[usable].tolist(), seed)
        summary = {
            "threshold": min_clip_score,
            "threshold_given": min_clip_score is not None,
            "mean": float(scores[usable].mean()),
            "mean_with_other_captions": float(mismatched.mean()) if len(mismatched) else None,
        }
        if min_clip_score is None and len(mismatched):
            summary["threshold"] = float(np.quantile(mismatched, MISMATCHED))
    reasons, copy_of = choose(
        states,
        embeds,
        reals,
        scores,
        groups,
        _first_rows(digests, groups, images),
        duplicate_threshold,
        summary and summary["threshold"],
        best_k,
    )
    kept = np.array([reason is None for reason in reasons])
    if summary is not None:
        summary["mean_of_kept"] = float(scores[kept].mean()) if kept.any() else None
    copies = [
        None if copy < 0 else int(real_rows[copy] if reason == REAL_COPY else copy)
        for reason, copy in zip(reasons, copy_of, strict=True)
    ]
    mask = pa.table(
        {
            "row": pa.array(range(len(reasons)), pa.int64()),
            "file_name": pa.array(_file_names(images), pa.string()),
            "caption": pa.array(captions, pa.string()),
            "kept": pa.array(kept),
            "reason": pa.array(reasons, pa.string()),
            "copy_of": pa.array(copies, pa.int64()),
            "clip_score": pa.array(
                [None] * len(reasons) if scores is None else scores, pa.float64(), from_pandas=True
            ),
            "digest": pa.array(digests, pa.string()),
        }
    )
    result = {
        "counts": {"generated images": len(kept), "kept": int(kept.sum()), "left out": int((~kept).sum())},
        "dropped": {reason: reasons.count(reason) for reason in IN_WORDS},
        "real_images": len(real_rows),
        "clip_score": summary,
        "same_model": score_model is not None
        and _key(images, model, processor) == _key(images, score_model, score_processor),
    }
    return result, mask


def _inspect(cell: Any) -> tuple[str, str | None]:
    """Return the digest and the state of an image."""
    digest = digest_of(cell)
    try:
        constant = max(ImageStat.Stat(decode_image(cell)).stddev) < CONSTANT_DEVIATION
    except BadImageError:
        return digest, UNREADABLE
    return digest, CONSTANT if constant else None


def _first_rows(digests: list[str], captions: Sequence[Any], images: Dataset) -> np.ndarray:
    """
    Return the first row with the same image for rows that repeat an image on purpose: with several captions of one id,
    or as the partner of several real images with one caption. For other rows, return the row itself.
    """
    ids = images["image_id"][:] if "image_id" in images.column_names else list(range(len(images)))
    paired = "real_image" in images.column_names
    first, rows = {}, np.arange(len(digests))
    for row, digest in enumerate(digests):
        one = first.setdefault(digest, row)
        same_caption, same_id = captions[one] == captions[row], ids[one] == ids[row]
        if (same_id and not same_caption) or (paired and same_caption and not same_id):
            rows[row] = one
    return rows


def _file_names(images: Dataset) -> list[str | None]:
    """Return the paths of images that are separate files, relative to their common folder."""
    paths = list(paths_of(images, "generated_image"))
    files = [path for path in paths if path is not None and "://" not in path]
    folder = os.path.commonpath([os.path.dirname(path) for path in files]) if files else ""
    return [path if path is None or "://" in path else os.path.relpath(path, folder) for path in paths]


def _key(images: Dataset, model: Any, processor: Any) -> str:
    """Return a key that is equal for two models whose real branches give equal embeddings."""
    return cache_key(images.select_columns(["generated_image"]), "generated_image", model, processor)
