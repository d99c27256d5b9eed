"""Embeddings of a benchmark's images and texts by a CLIP or a vision-only model, with or without branches."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.base import GmailModel, context_length, text_options
from ..training.data import image_processor_of
from ..training.embeddings import batches
from .measure import Settings
from .sources import read_image


def image_embeds(
    model: Any, processor: Any, cells: Iterable[Any], modality: str, settings: Settings, desc: str
) -> np.ndarray:
    """
    Embeddings of images, read and embedded batch by batch.

    Args:
        model ([`GmailCLIPModel`], `CLIPModel` or another base): in evaluation mode.
        processor: its processor.
        cells: images, see `decode_image`; they need no length.
        modality: the branch.
        desc: title of the progress bar.

    Returns:
        `np.ndarray` of shape `(images, projection_dim)`, float32, L2-normalised.

    Raises:
        ValueError: an image cannot be read or its embedding is not finite, with its row.
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
    """As [`image_embeds`], of one batch whose first row is `first`."""
    branch = {"modality": modality} if isinstance(model, GmailModel) else {}
    images = [read_image(cell, f"{desc}: image {first + i}") for i, cell in enumerate(cells)]
    inputs = image_processor_of(processor)(images=images, return_tensors="pt").to(model.device, model.dtype)
    if hasattr(model, "get_image_features"):
        features = model.get_image_features(**inputs, **branch).pooler_output
    else:  # a vision-only base: its class token
        features = model(**inputs).last_hidden_state[:, 0]
    return _unit(features, first, f"{desc}: the embedding of image")


@torch.no_grad()
def text_embeds(model: Any, processor: Any, texts: list[str], settings: Settings, desc: str | None) -> np.ndarray:
    """
    Embeddings of texts, each cut to the model's context.

    Args:
        model, processor: as in [`image_embeds`].
        desc: title of the progress bar; without one there is no bar.

    Returns:
        `np.ndarray` of shape `(texts, projection_dim)`, float32, L2-normalised.

    Raises:
        ValueError: an embedding is not finite, with its row.
    """
    embeds = []
    with tqdm(desc=desc, unit="text", disable=desc is None or not settings.progress, total=len(texts)) as bar:
        for batch in batches(texts, settings.batch_size):
            tokens = processor.tokenizer(batch, **text_options(model), return_tensors="pt").to(model.device)
            names = [name for name in ("input_ids", "attention_mask") if name in tokens]
            features = model.get_text_features(**{name: tokens[name] for name in names}).pooler_output
            embeds.append(_unit(features, sum(map(len, embeds)), "The embedding of text"))
            bar.update(len(batch))
    return np.concatenate(embeds)


def count_truncated(model: Any, processor: Any, texts: list[str]) -> int:
    """How many texts are longer than what the model reads."""
    tokens = processor.tokenizer(texts, verbose=False)["input_ids"]
    return sum(len(ids) > context_length(model) for ids in tokens)


def _unit(features: torch.Tensor, first: int, what: str) -> np.ndarray:
    embeds = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(embeds).all(axis=1))
    if len(bad):
        raise ValueError(f"{what} {first + bad[0]} is not finite; look at it, or use --dtype float32.")
    return embeds
