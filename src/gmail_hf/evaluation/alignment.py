"""Alignment of generated images with their real partners (the paper's Table 14 and Figure 3)."""

from io import BytesIO
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..metrics import alignment_metrics, plot_embeddings, separability
from ..metrics.paired import gen_to_real_ranks
from ..models.base import GmailModel
from ..training.data import caption_ids, decode_image
from ..training.embeddings import batches
from .embedding import embed_batch
from .measure import Example, Measured, Settings, interval, recall_intervals
from .sources import Source

MIN_PAIRS, MIN_IMAGES = 10, 5  # the figure and the folds need them
EXAMPLES = 12


def evaluate_alignment(model: Any, processor: Any, source: Source, settings: Settings) -> Measured:
    """
    Compare generated images with their real partners before alignment (through `real`, as if they were photographs)
    and after it (through `gen`). Real images go through `real`.

    Args:
        model, processor: a [`GmailCLIPModel`] or `CLIPModel` and its processor, in evaluation mode, on its device. A
            model without a `gen` branch is only measured before alignment.
        source: pairs with `generated_image`.
        settings: see [`Settings`]. Its modality is ignored.

    Returns:
        Scores of [`metrics.alignment_metrics`] and `separability`, each `_before` and `_after`, and a figure of the
        embeddings.

    Raises:
        ValueError: fewer than 10 pairs or 5 different real images, or an image is unreadable or has an embedding that
            is not finite.
        ImportError: scikit-learn or matplotlib is missing.
    """
    ways = {"real": ("real_image", "real"), "before": ("generated_image", "real")}
    if has_gen_branch(model):
        ways["after"] = ("generated_image", "gen")
    embeds: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    ids: list[tuple[str, str]] = []  # caption and image id of each pair
    examples: list[Example] = []
    with tqdm(desc="Pairs", unit="pair", disable=not settings.progress) as bar:
        for rows in batches(source.read(), settings.batch_size):
            for name, (column, modality) in ways.items():
                desc = f"{source.name}, {column}"
                cells = [row[column] for row in rows]
                embeds[name].append(embed_batch(model, processor, cells, modality, len(ids), desc))
            for row in rows[: EXAMPLES - len(examples)]:
                images = [decode_image(row["real_image"]), decode_image(row["generated_image"])]
                examples.append(Example(images, row["caption"]))
            captions = [row["caption"] for row in rows]
            found = caption_ids(captions, getattr(processor, "tokenizer", None))
            ids += [(str(caption), str(row["image_id"])) for caption, row in zip(found, rows, strict=True)]
            bar.update(len(rows))
    images = len({image_id for _, image_id in ids})
    if len(ids) < MIN_PAIRS or images < MIN_IMAGES:
        raise ValueError(
            f"Alignment needs at least {MIN_PAIRS} pairs with {MIN_IMAGES} different real images; '{source.name}' has "
            f"{len(ids)} pairs with {images} real images."
        )
    generated = {name: np.concatenate(parts) for name, parts in embeds.items()}
    real = generated.pop("real")
    caption_keys, image_ids = np.array(ids).T
    scores, intervals, figures = {}, {}, {}
    for when, moved in generated.items():
        found = alignment_metrics(moved, real, caption_keys, image_ids)
        found["separability"] = separability(moved, real, settings.seed, image_ids=image_ids)
        ranks = gen_to_real_ranks(moved, real, caption_keys, image_ids)
        means = {
            "paired_cosine": interval((moved * real).sum(axis=1), settings),
            **recall_intervals(ranks, "gen_to_real", settings),
        }
        scores |= {f"{name}_{when}": value for name, value in found.items()}
        intervals |= {f"{name}_{when}": ends for name, ends in means.items()}
    if "after" in generated:
        picture = BytesIO()
        moved = generated["before"], generated["after"]
        plot_embeddings(picture, real, *moved, seed=settings.seed, image_ids=image_ids)
        figures["Embeddings before and after alignment"] = picture.getvalue()
    return Measured(
        scores=scores, intervals=intervals, counts={"pairs": len(real)}, examples=examples, figures=figures
    )


def has_gen_branch(model: Any) -> bool:
    return isinstance(model, GmailModel) and "gen" in model.config.modalities
