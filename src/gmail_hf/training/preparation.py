"""Prepare pairs for training: embeddings instead of images for frozen branches, and other partners if requested."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..models.base import text_options
from .arguments import GmailTrainingArguments
from .checks import needed_columns
from .data import SIDES, caption_ids, column_names, undecoded
from .embeddings import cached_embeds, embeds_array
from .losses import GmailLossConfig
from .pairing import optimal_pairing, random_pairing


class EmbeddedPairs(torch.utils.data.Dataset):
    """
    Pairs with embeddings instead of images, without copying rows. An embedding is None if its image is unreadable.

    Args:
        pairs (`datasets.Dataset`): see [`check_pairs`].
        real, generated (`datasets.Dataset`, *optional*): embeddings of the pairs' real and generated images, row by
            row, in a column `image_embeds`, as returned by [`cached_embeds`].
        partners (`np.ndarray` of shape `(pairs,)`, *optional*): the row of the real partner of each generated image.
        redraw (*optional*): a function that returns the partners of an epoch; overrides `partners`.
    """

    def __init__(
        self,
        pairs: Dataset,
        real: Dataset | None = None,
        generated: Dataset | None = None,
        partners: np.ndarray | None = None,
        redraw: Callable[[int], np.ndarray] | None = None,
    ):
        embeds = {"real": real, "generated": generated}
        images = [f"{side}_image" for side, given in embeds.items() if given is None]
        kept = ["caption", *(column for column in images if column in pairs.column_names)]
        self.pairs = undecoded(pairs.select_columns(kept))
        self.image_ids = pairs.select_columns(["image_id"])
        self.embeds = {side: given for side, given in embeds.items() if given is not None}
        self.partners = np.arange(len(pairs)) if partners is None else partners
        self.redraw = redraw
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, see [`EpochCallback`]."""
        if self.redraw is not None:
            self.partners = self.redraw(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        partners = self.partners[indices].tolist()
        columns = {"image_id": self.image_ids[partners]["image_id"]}
        for side, embeds in self.embeds.items():
            columns[f"{side}_embeds"] = embeds[partners if side == "real" else indices]["image_embeds"]
        return [
            {**row, **dict(zip(columns, values, strict=True))}
            for row, values in zip(self.pairs.__getitems__(indices), zip(*columns.values(), strict=True), strict=True)
        ]


def drop_unused(pairs: Dataset | IterableDataset, losses: GmailLossConfig) -> Dataset | IterableDataset:
    """Remove images and embeddings that no loss uses. Evaluation data keeps them, because metrics may use them."""
    if isinstance(pairs, IterableDataset):
        pairs = undecoded(pairs)  # otherwise removing a column decodes the images
    unused = [side for side in SIDES if f"{side}_image" not in needed_columns(losses)]
    unused = [f"{side}_{kind}" for side in unused for kind in ("image", "embeds")]
    return pairs.remove_columns([column for column in column_names(pairs) if column in unused])


def replace_images(
    pairs: Dataset | IterableDataset,
    model: Any,
    processor: Any,
    args: GmailTrainingArguments,
    pairing: str = "caption",
    barrier: Callable[[], None] | None = None,
) -> torch.utils.data.Dataset | IterableDataset:
    """
    Replace the images of frozen branches by embeddings, either from the data set or from the cache.

    Args:
        pairs: see [`check_for_training`].
        model, processor: as in [`cached_embeds`].
        args ([`GmailTrainingArguments`]): the settings.
        pairing (`str`): `"caption"`, `"optimal"` (see [`optimal_pairing`]) or `"none"` (see [`random_pairing`]).
        barrier: as in [`cached_embeds`].

    Returns:
        [`EmbeddedPairs`], or the pairs with undecoded images if they are streamed or nothing was replaced.
    """
    columns = column_names(pairs)
    given = [side for side in SIDES if f"{side}_embeds" in columns]
    if isinstance(pairs, IterableDataset):
        return undecoded(pairs).remove_columns([f"{side}_image" for side in given if f"{side}_image" in columns])

    def embed(side: str, modality: str) -> Dataset:
        return cached_embeds(
            pairs,
            f"{side}_image",
            model,
            processor,
            modality,
            batch_size=args.per_device_eval_batch_size,
            on_bad_image=args.on_bad_image,
            barrier=barrier,
            rank=args.process_index,
            world_size=args.world_size,
        )

    embeds = {}
    for side, modality in args.branches.items():
        if side in given:
            embeds[side] = pairs.select_columns([f"{side}_embeds"]).rename_column(f"{side}_embeds", "image_embeds")
        elif f"{side}_image" in columns and not model.trains(modality):
            if args.cache_real_embeds and args.token_weight == 0:  # patch tokens are not cached
                embeds[side] = embed(side, modality)
    if pairing in ("optimal", "none"):  # captions are equal if they are equal to the model
        tokenizer = getattr(processor, "tokenizer", None) if hasattr(model, "text_model") else None
        captions = caption_ids(pairs["caption"][:], tokenizer, **(text_options(model) if tokenizer else {}))
    if pairing == "optimal":
        partners = _optimal_partners(embed("generated", "real"), embeds["real"], captions, args.seed)
        return EmbeddedPairs(pairs, **embeds, partners=partners)
    if pairing == "none":
        return EmbeddedPairs(pairs, **embeds, redraw=partial(random_pairing, captions, args.seed))
    return EmbeddedPairs(pairs, **embeds) if embeds else undecoded(pairs)


def _optimal_partners(generated: Dataset, real: Dataset, captions: list[int], seed: int) -> np.ndarray:
    """Apply [`optimal_pairing`] to the pairs with readable images; the others keep their partners."""
    generated, real = embeds_array(generated), embeds_array(real)
    real /= np.linalg.norm(real, axis=1, keepdims=True)  # embeddings of the data set may have any length
    rows = np.flatnonzero(np.isfinite(generated).all(axis=1) & np.isfinite(real).all(axis=1))
    partners = np.arange(len(captions))
    partners[rows] = rows[optimal_pairing(generated[rows], real[rows], [captions[row] for row in rows], seed=seed)]
    return partners
