"""How near generated images lie to their real partners (the paper's Table 14 and Figure 3)."""

from io import BytesIO
from typing import Any

import numpy as np

from ..evaluation import alignment_metrics, plot_embeddings, retrieval_ranks, separability
from ..modeling_gmail import GmailCLIPModel
from .data import Source, read_image
from .embed import image_embeds
from .measure import Example, Measured, Settings, interval, recall_intervals

MIN_PAIRS = 10  # fewer are too few for folds and a picture
EXAMPLES = 12


def evaluate_alignment(model: Any, processor: Any, source: Source, settings: Settings) -> Measured:
    """
    Generated images beside their real partners, before alignment (through `real`, as if they were photographs) and
    after (through `gen`); real images go through `real`.

    Args:
        model ([`GmailCLIPModel`] or `CLIPModel`), processor: in evaluation mode, on its device; a model without a
            `gen` branch is told before alignment only.
        source: of pairs with `generated_image`.
        settings: see [`Settings`]; its modality does not matter here.

    Returns:
        Scores of [`evaluation.alignment_metrics`] and `separability`, each `_before` and `_after`; a figure of the
        embeddings.

    Raises:
        ValueError: fewer than 10 pairs; an image that is unreadable or whose embedding is not finite.
        ImportError: scikit-learn or matplotlib is missing.
    """
    examples: list[Example] = []
    ids: list[tuple[str, str]] = []  # caption and image id of each pair

    def cells(side: str):
        for row in source.read():
            if side == "real":
                ids.append((str(row["caption"]), str(row["image_id"])))
                if len(examples) < EXAMPLES:
                    where = f"{source.name}: image {row['image_id']}"
                    images = [read_image(row[f"{side}_image"], where) for side in ("real", "generated")]
                    examples.append(Example(images, row["caption"]))
            yield row[f"{side}_image"]

    def embed(side: str, modality: str) -> np.ndarray:
        desc = f"{source.name}, {side} images through {modality}"
        return image_embeds(model, processor, cells(side), modality, settings, desc)

    real = embed("real", "real")
    if len(real) < MIN_PAIRS:
        raise ValueError(f"Alignment needs at least {MIN_PAIRS} pairs; '{source.name}' has {len(real)}.")
    generated = {"before": embed("generated", "real")}
    if has_gen_branch(model):
        generated["after"] = embed("generated", "gen")
    caption_ids, image_ids = np.array(ids).T
    both = np.array(ids)
    scores, intervals, figures = {}, {}, {}
    for when, embeds in generated.items():
        found = alignment_metrics(embeds, real, caption_ids, image_ids)
        found["separability"] = separability(embeds, real, settings.seed)
        ranks = retrieval_ranks(embeds, real, both, both)
        means = {
            "paired_cosine": interval((embeds * real).sum(axis=1), settings),
            **recall_intervals(ranks, "gen_to_real", settings),
        }
        scores |= {f"{name}_{when}": value for name, value in found.items()}
        intervals |= {f"{name}_{when}": ends for name, ends in means.items()}
    if "after" in generated:
        picture = BytesIO()
        plot_embeddings(picture, real, generated["before"], generated["after"], seed=settings.seed)
        figures["Embeddings before and after alignment"] = picture.getvalue()
    return Measured(
        scores=scores, intervals=intervals, counts={"pairs": len(real)}, examples=examples, figures=figures
    )


def has_gen_branch(model: Any) -> bool:
    return isinstance(model, GmailCLIPModel) and "gen" in model.config.modalities
