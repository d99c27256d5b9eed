"""Embeds a benchmark's images and texts with a CLIP or a vision-only model, with or without branches."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.base import GmailModel, context_length
from ..training.data import image_processor_of
from ..training.embeddings import batches, embed_texts, unit_rows
from .measure import Settings
from .sources import read_image


def image_embeds(
    model: Any, processor: Any, cells: Iterable[Any], modality: str, settings: Settings, desc: str
) -> np.ndarray:
    """
    Read and embed images batch by batch.

    Args:
        model ([`GmailCLIPModel`], `CLIPModel` or another base): in evaluation mode.
        processor: its processor.
        cells: images, see `decode_image`. They may be an iterator.
        modality: the branch.
        desc: title of the progress bar.

    Returns:
        `np.ndarray` of shape `(images, projection_dim)`, float32, L2-normalised.

    Raises:
        ValueError: an image cannot be read or its embedding is not finite. The message gives its row.
    """
    embeds, done = [], 0
    with tqdm(desc=desc, unit="image", disable=not settings.progress) as bar:
        for batch in batches(cells, settings.batch_size):
            embeds.append(embed_batch(model, processor, batch, modality, done, desc))
            done += len(batch)
            bar.update(len(batch))
    return np.concatenate(embeds)


@torch.no_grad()
def embed_batch(model: Any, processor: Any, cells: list[Any], modality: str, first: int, desc: str) -> np.ndarray:
    """As [`image_embeds`], for one batch that starts at row `first`."""
    branch = {"modality": modality} if isinstance(model, GmailModel) else {}
    images = [read_image(cell, f"{desc}: image {first + i}") for i, cell in enumerate(cells)]
    inputs = image_processor_of(processor)(images=images, return_tensors="pt").to(model.device, model.dtype)
    if hasattr(model, "get_image_features"):
        features = model.get_image_features(**inputs, **branch).pooler_output
    else:  # a vision-only base: use its class token
        features = model(**inputs).last_hidden_state[:, 0]
    return unit_rows(features, first, f"{desc}: the embedding of image")


@torch.no_grad()
def text_embeds(model: Any, processor: Any, texts: list[str], settings: Settings, desc: str | None) -> np.ndarray:
    """
    Embed texts, each truncated to the model's context length.

    Args:
        model, processor: as in [`image_embeds`].
        desc: title of the progress bar, or None for no bar.

    Returns:
        `np.ndarray` of shape `(texts, projection_dim)`, float32, L2-normalised.

    Raises:
        ValueError: an embedding is not finite. The message gives its row.
    """
    return embed_texts(model, processor.tokenizer, texts, settings.batch_size, desc if settings.progress else None)


def count_truncated(model: Any, processor: Any, texts: list[str]) -> int:
    """Count the texts that are longer than the model's context."""
    tokens = processor.tokenizer(texts, verbose=False)["input_ids"]
    return sum(len(ids) > context_length(model) for ids in tokens)
