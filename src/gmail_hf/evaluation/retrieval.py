"""Image-text retrieval (the paper's Tables 2, 3, 5 and 7)."""

from typing import Any

import numpy as np

from ..metrics import image_text_ranks, recall_at_k
from ..models.base import text_options
from ..training.data import caption_ids
from .embedding import count_truncated, image_embeds, text_embeds
from .measure import Measured, Settings, recall_intervals
from .sources import Source, captioned_images


def evaluate_retrieval(model: Any, processor: Any, source: Source, settings: Settings) -> Measured:
    """
    Evaluate image-to-text and text-to-image retrieval.

    If each image has one caption, images whose captions are equal to the model are correct answers for each other.

    Args:
        model, processor: a [`GmailCLIPModel`] or `CLIPModel` and its processor, in evaluation mode, on its device.
        source: captions or pairs. Rows with the same `image_id` are the same image.
        settings: see [`Settings`].

    Returns:
        The scores of [`metrics.image_text_retrieval`].

    Raises:
        ValueError: an image has no caption, is unreadable or has an embedding that is not finite.
    """
    captions: dict[Any, dict[str, None]] = {}
    cells = (cell for _, cell in captioned_images(source, captions))
    images = image_embeds(model, processor, cells, settings.modality, settings, source.name)
    texts = [caption for written in captions.values() for caption in written]
    counts = [len(written) for written in captions.values()]
    embeds = text_embeds(model, processor, texts, settings, "Captions")
    image_ids = np.arange(len(images))
    if len(texts) == len(images):
        ids = {"caption_ids": np.array(caption_ids(texts, processor.tokenizer, **text_options(model)))}
    else:
        ids = {"text_image_ids": np.repeat(image_ids, counts)}
    scores, intervals = {}, {}
    for way, ranks in image_text_ranks(images, embeds, image_ids, **ids).items():
        scores |= {f"{way}_{name}": value for name, value in recall_at_k(ranks).items()}
        scores[f"{way}_median_rank"] = float(np.median(ranks))
        intervals |= recall_intervals(ranks, way, settings)
    return Measured(
        scores=scores,
        intervals=intervals,
        counts={
            "images": len(images),
            "captions": len(texts),
            "truncated captions": count_truncated(model, processor, texts),
        },
    )
