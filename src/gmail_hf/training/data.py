"""
Pairs of a real and a generated image: the column schema and the collator.

A data set of pairs has the columns `real_image` and `generated_image` (`datasets.Image`), `caption` (string) and
`image_id` (string or integer, the same for all pairs of one real image). A loss that uses one kind of image, as in
stage 2, does not need the other. Precomputed embeddings can replace the images of a frozen branch: the columns
`real_embeds` and `generated_embeds` hold lists of `projection_dim` floats.
"""

import copy
import dataclasses
import hashlib
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset, LargeList, List
from datasets.fingerprint import Hasher
from PIL import Image as PILImage
from transformers.utils import logging

from .decoding import BadImageError, decode_image
from .images import PixelValues, raw_pixels

SIDES = ("real", "generated")
PIXEL_SCALE = ("pixel_mean", "pixel_std")
PAIR_COLUMNS = ("real_image", "generated_image", "caption", "image_id")

# Each process reports the images that it cannot read; other messages come only from the main process.
bad_images = logging.get_logger(f"{__name__}.bad_images")


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Turn off the decoding of images, also of lists of images, so that the error about a damaged image can name it.

    Raises:
        ValueError: the data set has a transform, which expects decoded images.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            "The data set has a transform (`set_transform` or `with_transform`), which would not be applied: images "
            "are decoded later, and those of a frozen branch only once. Remove it with `dataset.reset_format()`. To "
            "change the images once, use `dataset.map`."
        )
    for name, feature in (dataset.features or {}).items():
        raw = _undecoded_feature(feature)
        if raw == feature:
            continue
        if isinstance(feature, Image) or isinstance(dataset, IterableDataset):
            dataset = dataset.cast_column(name, raw)
        else:  # `cast_column` would write a copy of all images in lists
            dataset = copy.deepcopy(dataset)
            dataset.info.features[name] = raw
            dataset._fingerprint = Hasher.hash([dataset._fingerprint, name, "undecoded"])
    return dataset


def _undecoded_feature(feature: Any) -> Any:
    if isinstance(feature, Image) and feature.decode:
        return Image(decode=False)
    if isinstance(feature, (List, LargeList)):
        return dataclasses.replace(feature, feature=_undecoded_feature(feature.feature))
    return feature


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a data set, taken from its first row if it is streamed and declares none."""
    return dataset.column_names or list(next(iter(undecoded(dataset).take(1)), {}))


def stable_id(value: str | int) -> int:
    """
    A 63-bit hash of an image id or a caption, the same in every process and on every machine.

    Raises:
        ValueError: `value` is None or NaN. All pairs without an id would count as the same image.
    """
    if value is None or value != value:
        raise ValueError("A pair has an empty `image_id` or `caption`. Each pair needs both.")
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "little") >> 1


def caption_ids(captions: list[str], tokenizer: Any = None, **options: Any) -> list[int]:
    """
    A number per caption, equal for captions that the model cannot tell apart, such as `a cat` and `A cat ` for CLIP.

    Args:
        captions: texts.
        tokenizer: the model's tokenizer. Without it, captions that differ only in case and spaces are equal.
        options: arguments of the tokenizer.
    """
    if None in captions:
        return [stable_id(caption) for caption in captions]
    if tokenizer is None:
        return [stable_id(" ".join(caption.lower().split())) for caption in captions]
    tokens = tokenizer(captions, **{**options, "padding": False})["input_ids"]
    return [stable_id(" ".join(map(str, ids))) for ids in tokens]


class GmailCollator:
    """
    Turn rows of a data set of pairs into a batch: the arguments of [`GmailCLIPModel.forward`] and the pairs' ids.

    Args:
        processor: a model's processor, or only its image processor if no captions are needed.
        with_text (`bool`): also tokenise the captions, which the text losses need.
        on_bad_image (`str`): `"skip"` leaves out a pair with an unreadable image, logs a warning that names it and
            counts it in `skipped_pairs`; `"error"` raises.
        eight_bit (`bool`): keep pixels as uint8, a quarter of the bytes to copy to the model. The batch then holds the
            processor's `pixel_mean` and `pixel_std` `(3,)`, float32, with which the model normalises them.
        text_options (`dict`, *optional*): arguments of the tokenizer, see [`text_options`]. By default, captions are
            padded to the longest one and truncated at the tokenizer's own limit.

    Returns of a call:
        `generated_pixel_values`, `real_pixel_values` `(pairs, channels, height, width)`, float32 or uint8, or
        `generated_embeds`, `real_embeds` `(pairs, dim)`, float32, if the rows hold these (one that is missing or not
        finite counts as a bad image); `image_ids`, `caption_ids` `(pairs,)` int64; with text `input_ids`,
        `attention_mask` `(pairs, tokens)` int64; `skipped_pairs` `()` int64. Columns that the rows lack are left out.
        If no pair can be read, `pairs` is 0.

    Raises:
        ValueError: a bad image with `"error"`, or a pair without an id or a caption.
    """

    def __init__(
        self,
        processor: Any,
        with_text: bool = False,
        on_bad_image: str = "skip",
        eight_bit: bool = False,
        text_options: dict[str, Any] | None = None,
    ):
        if on_bad_image not in ("skip", "error"):
            raise ValueError(f"`on_bad_image` must be 'skip' or 'error', got '{on_bad_image}'.")
        self.pixel_values = PixelValues(image_processor_of(processor))
        self.tokenizer = getattr(processor, "tokenizer", None)
        if with_text and self.tokenizer is None:
            raise ValueError("The text losses need a processor with a tokenizer, such as CLIPProcessor.")
        self.with_text = with_text
        self.text_options = text_options or {"padding": True, "truncation": True}
        self.on_bad_image = on_bad_image
        self.eight_bit = eight_bit

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sides = [side for side in SIDES if f"{side}_image" in rows[0] or f"{side}_embeds" in rows[0]]
        kept, images = [], []
        for row in rows:
            try:
                found = [self._image(row, side) for side in sides]
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise ValueError(f"Pair with image_id {row['image_id']}: {error}.") from error
                bad_images.warning(f"Pair with image_id {row['image_id']} is skipped: {error}.")
                continue
            kept.append(row)
            images.append(found)
        if not kept:
            return self._empty_batch(rows)
        captions = [row["caption"] for row in kept]
        batch = {
            "image_ids": torch.tensor([stable_id(row["image_id"]) for row in kept]),
            "caption_ids": torch.tensor(caption_ids(captions, self.tokenizer, **self.text_options)),
            "skipped_pairs": torch.tensor(len(rows) - len(kept)),
        }
        for side, values in zip(sides, zip(*images, strict=True), strict=True):
            if f"{side}_embeds" in kept[0]:
                batch[f"{side}_embeds"] = torch.from_numpy(np.stack(values))
            else:
                pixels = self.pixel_values.eight_bit(values) if self.eight_bit else None
                if pixels is None:
                    inputs = self.pixel_values.inputs(values)
                    batch |= {f"{side}_{name}": tensor for name, tensor in inputs.items()}
                else:
                    batch[f"{side}_pixel_values"] = pixels
                    batch |= {"pixel_mean": self.pixel_values.mean, "pixel_std": self.pixel_values.std}
        if self.with_text:
            tokens = self.tokenizer(captions, **self.text_options, return_tensors="pt")
            batch.update({name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens})
        return batch

    def _empty_batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch if no pair can be read: it has no pairs, but other processes can still gather with it."""
        stand_in = {**rows[0], "image_id": "", "caption": ""}
        for side in SIDES:
            if f"{side}_embeds" in stand_in:
                embeds = (row[f"{side}_embeds"] for row in rows)
                stand_in[f"{side}_embeds"] = np.zeros(max(0 if value is None else len(value) for value in embeds))
            elif f"{side}_image" in stand_in:
                stand_in[f"{side}_image"] = PILImage.new("RGB", (64, 64))
        batch = self([stand_in])
        batch = {name: values if name in PIXEL_SCALE else values[:0] for name, values in batch.items() if values.dim()}
        return {**batch, "skipped_pairs": torch.tensor(len(rows))}

    def _image(self, row: dict[str, Any], side: str) -> Any:
        if f"{side}_embeds" not in row:
            cell = row[f"{side}_image"]
            pixels = raw_pixels(cell["bytes"]) if isinstance(cell, dict) else None
            return decode_image(cell) if pixels is None else pixels
        if row[f"{side}_embeds"] is None:
            raise BadImageError(f"the embedding of its {side} image is missing, because the image could not be read")
        embeds = np.asarray(row[f"{side}_embeds"], np.float32)
        if not np.isfinite(embeds).all():
            raise BadImageError(f"the embedding of its {side} image is not finite")
        return embeds


def image_processor_of(processor: Any) -> Any:
    """The image processor of a processor, or `processor` itself if it is one."""
    return getattr(processor, "image_processor", processor)
