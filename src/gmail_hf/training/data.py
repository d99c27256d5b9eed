"""
Pairs of a real and a generated image: the column schema, the checks before training, the collator.

A data set of pairs has the columns `real_image` and `generated_image` (`datasets.Image`), `caption` (string) and
`image_id` (string or integer, the same for all pairs of one real image). A loss that looks at one kind of image, as in
stage 2, does not need the other. Embeddings computed beforehand can replace the images of a frozen branch: the columns
`real_embeds` and `generated_embeds` hold lists of `projection_dim` floats.
"""

import copy
import dataclasses
import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Image, IterableDataset, LargeList, List
from datasets.fingerprint import Hasher
from PIL import Image as PILImage
from PIL import ImageOps
from transformers.utils import logging

from .images import PixelValues, raw_pixels
from .losses import GmailLossConfig

SIDES = ("real", "generated")
PIXEL_SCALE = ("pixel_mean", "pixel_std")
PAIR_COLUMNS = ("real_image", "generated_image", "caption", "image_id")

logger = logging.get_logger(__name__)


class BadImageError(ValueError):
    """An image that cannot be read."""


def decode_image(cell: Any) -> PILImage.Image:
    """
    An RGB image from a cell of an image column: a `PIL.Image`, or `{"bytes", "path"}` of `Image(decode=False)`.

    Raises:
        BadImageError: the image is missing, truncated or in no known format.
    """
    opened = isinstance(cell, PILImage.Image)
    if not opened and (not isinstance(cell, dict) or (cell.get("bytes") is None and cell.get("path") is None)):
        raise BadImageError("no image in this cell")
    try:
        if opened:
            return ImageOps.exif_transpose(cell).convert("RGB")  # an opened file is read only now
        with PILImage.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]) as image:
            ImageOps.exif_transpose(image, in_place=True)  # upright, as datasets decodes it
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds on damaged files, SyntaxError among them
        name = getattr(cell, "filename", None) if opened else cell.get("path")
        raise BadImageError(f"{name or 'image'} cannot be read ({error})") from error


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    The data set with raw images in its columns of images and of lists of them, so that a damaged image fails where it
    can be named, not while loading.
    """
    for name, feature in (dataset.features or {}).items():
        raw = _undecoded_feature(feature)
        if raw == feature:
            continue
        if isinstance(feature, Image) or isinstance(dataset, IterableDataset):
            dataset = dataset.cast_column(name, raw)
        else:  # of lists `cast_column` would write a copy of all images
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


def check_pairs(
    dataset: Dataset | IterableDataset,
    name: str = "train_dataset",
    on_bad_image: str = "skip",
    needed: Sequence[str] = PAIR_COLUMNS,
    sample: int = 8,
    embed_dim: int | None = None,
) -> None:
    """
    Check columns and types of a data set of pairs and read a sample of them, before hours of work start.

    Args:
        dataset: the pairs.
        name: what errors call it.
        on_bad_image: see [`GmailCollator`].
        needed: the columns that must exist, such as [`needed_columns`] of the losses. `real_embeds` can replace
            `real_image`, and `generated_embeds` `generated_image`.
        sample: how many pairs to read.
        embed_dim (`int`, *optional*): the length that embeddings must have.

    Raises:
        ValueError: the data set is empty; a column is missing, of another type or the same throughout; embeddings of
            another length; a caption or id is missing; none of the sampled pairs can be read (or, under
            `on_bad_image="error"`, one of them cannot). In a streamed data set only the sample is checked.
    """
    if next(iter(_sample_rows(undecoded(dataset), 1)), None) is None:
        raise ValueError(f"{name} is empty.")
    columns = column_names(dataset)
    replaced = {f"{side}_image": f"{side}_embeds" for side in SIDES if f"{side}_embeds" in columns}
    missing = [column for column in needed if column not in columns and column not in replaced]
    if missing:
        raise ValueError(
            f"{name} lacks the column(s) {missing}; it has {columns}. The losses need {list(needed)}: rename yours "
            f"with `dataset.rename_column(old, new)`, or name them by the --*_column flags of examples/train_gmail.py."
        )
    images = [f"{side}_image" for side in SIDES if f"{side}_image" in needed and f"{side}_image" not in replaced]
    for column in images:
        feature = (dataset.features or {}).get(column)
        if feature is not None and not isinstance(feature, Image):
            raise ValueError(
                f"Column '{column}' of {name} is {feature}, not an image; cast it with "
                f"`dataset.cast_column('{column}', datasets.Image())`."
            )
    rows = list(_sample_rows(undecoded(dataset), sample))
    failures = []
    for row in rows:
        if not isinstance(row["caption"], str):
            raise ValueError(f"Column 'caption' of {name} holds {type(row['caption']).__name__}, not text.")
        if row["image_id"] is None:
            raise ValueError(f"Column 'image_id' of {name} has empty cells; each real image needs an id.")
        try:
            for column in images:
                decode_image(row[column])
            for column in replaced.values():
                _check_embedding(row[column], column, name, embed_dim)
        except BadImageError as error:
            failures.append(f"the pair with image_id {row['image_id']}: {error}")
    if len(failures) == len(rows) or (failures and on_bad_image == "error"):
        raise ValueError(
            f"{len(failures)} of {len(rows)} sampled pairs of {name} cannot be read, first {failures[0]}."
        )
    if isinstance(dataset, Dataset):  # of a stream the first rows say little about the others
        _check_ids(dataset, rows, name)
        for column in replaced.values():
            _check_lengths(dataset, column, name)


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a data set; those of its first row if it is streamed and declares none."""
    return dataset.column_names or list(next(iter(undecoded(dataset).take(1)), {}))


def needed_columns(losses: GmailLossConfig) -> tuple[str, ...]:
    """The columns that a data set needs for its losses, see [`check_pairs`]; captions and ids tell pairs apart."""
    images = {"real_image": losses.needs_real, "generated_image": losses.needs_generated}
    return (*(column for column, needed in images.items() if needed), "caption", "image_id")


def _check_embedding(value: Any, column: str, name: str, dim: int | None) -> None:
    if value is None:
        raise BadImageError(f"no embedding in '{column}'")
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.shape != (dim or array.size,):
        raise ValueError(
            f"Column '{column}' of {name} holds {array.dtype} of shape {array.shape}; each row needs one embedding, a "
            f"list of {dim or array.size} floats."
        )
    if not np.isfinite(array).all():
        raise BadImageError(f"the embedding in '{column}' is not finite")


def _check_lengths(dataset: Dataset, column: str, name: str) -> None:
    lengths = set()
    for values in dataset.select_columns([column]).with_format("arrow").iter(batch_size=100_000):
        lengths.update(pc.unique(pc.list_value_length(values[column])).to_pylist())
    if len(lengths - {None}) > 1:
        raise ValueError(
            f"Column '{column}' of {name} holds embeddings of different lengths, {sorted(lengths - {None})}."
        )


def _check_ids(dataset: Dataset, rows: list[dict], name: str) -> None:
    """Each pair has a caption and an id; pairs that share one are no negatives, so they may not all do."""
    for column in ("caption", "image_id"):
        start = 0
        for values in dataset.select_columns([column]).with_format("arrow").iter(batch_size=100_000):
            if values[column].null_count:
                row = start + values[column].is_null().to_pylist().index(True)
                raise ValueError(
                    f"Row {row} of {name} has no '{column}'; leave such rows out, by "
                    f"`dataset.filter(lambda row: row['{column}'] is not None)`."
                )
            start += len(values)
        if len(rows) > 1 and len({row[column] for row in rows}) == 1 and len(set(dataset[column][:])) == 1:
            raise ValueError(
                f"Column '{column}' of {name} is {rows[0][column]!r} throughout: pairs that share it are no negatives "
                "of each other, so there would be nothing to learn."
            )


def _sample_rows(dataset: Dataset | IterableDataset, sample: int) -> Iterable[dict]:
    if isinstance(dataset, IterableDataset):
        return dataset.take(sample)
    if len(dataset) == 0:
        return []
    indices = np.unique(np.linspace(0, len(dataset) - 1, sample).astype(int))
    return dataset.select(indices)


def stable_id(value: str | int) -> int:
    """
    A number of 63 bits for an image id or a caption, the same in every process and on every machine.

    Raises:
        ValueError: there is none; pairs without an id would count as pairs of one id.
    """
    if value is None:
        raise ValueError("A pair has an empty `image_id` or `caption`; each needs one.")
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "little") >> 1


class GmailCollator:
    """
    Rows of a data set of pairs to a batch: the arguments of [`GmailCLIPModel.forward`] and the ids of the pairs.

    Args:
        processor: a `CLIPProcessor`, or an image processor alone if `with_text` is False.
        with_text (`bool`): tokenise the captions too; the text losses need them.
        on_bad_image (`str`): `"skip"` leaves the pair of an unreadable image out, with a warning that names it, and
            counts it in `skipped_pairs`; `"error"` raises.
        eight_bit (`bool`): leave pixels as uint8, a quarter of the bytes on their way to the model, which normalises
            them with the processor's `pixel_mean` and `pixel_std` `(3,)`, float32.

    Returns of a call:
        `generated_pixel_values`, `real_pixel_values` `(pairs, channels, height, width)` or, where the rows hold
        `generated_embeds` or `real_embeds`, these in their place, `(pairs, dim)` (one that is missing or not finite
        counts as a bad image), all float32; `image_ids`, `caption_ids` `(pairs,)` int64; `input_ids`,
        `attention_mask` `(pairs, tokens)` int64 with text; `skipped_pairs` `()` int64. What the rows lack is left out;
        where no pair can be read, `pairs` is 0.

    Raises:
        ValueError: a bad image under `"error"`; a pair without id or caption.
    """

    def __init__(self, processor: Any, with_text: bool = False, on_bad_image: str = "skip", eight_bit: bool = False):
        if on_bad_image not in ("skip", "error"):
            raise ValueError(f"`on_bad_image` is 'skip' or 'error', got '{on_bad_image}'.")
        self.pixel_values = PixelValues(image_processor_of(processor))
        self.tokenizer = getattr(processor, "tokenizer", None)
        if with_text and self.tokenizer is None:
            raise ValueError("The text losses need a processor with a tokenizer, such as CLIPProcessor.")
        self.with_text = with_text
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
                logger.warning(f"Pair with image_id {row['image_id']} is skipped: {error}.")
                continue
            kept.append(row)
            images.append(found)
        if not kept:
            return self._empty_batch(rows)
        batch = {
            "image_ids": torch.tensor([stable_id(row["image_id"]) for row in kept]),
            "caption_ids": torch.tensor([stable_id(row["caption"]) for row in kept]),
            "skipped_pairs": torch.tensor(len(rows) - len(kept)),
        }
        for side, values in zip(sides, zip(*images, strict=True), strict=True):
            if f"{side}_embeds" in kept[0]:
                batch[f"{side}_embeds"] = torch.from_numpy(np.stack(values))
            else:
                pixels = self.pixel_values.eight_bit(values) if self.eight_bit else None
                batch[f"{side}_pixel_values"] = self.pixel_values(values) if pixels is None else pixels
                if pixels is not None:
                    batch |= {"pixel_mean": self.pixel_values.mean, "pixel_std": self.pixel_values.std}
        if self.with_text:
            captions = [row["caption"] for row in kept]
            batch.update(self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt"))
        return batch

    def _empty_batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """No pair of the rows can be read: a batch without pairs, which other processes can still gather with."""
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
            raise BadImageError(f"it has no embedding of its {side} image, which could not be read")
        embeds = np.asarray(row[f"{side}_embeds"], np.float32)
        if not np.isfinite(embeds).all():
            raise BadImageError(f"the embedding of its {side} image is not finite")
        return embeds


def image_processor_of(processor: Any) -> Any:
    """The image processor inside a `CLIPProcessor`, or the one given."""
    return getattr(processor, "image_processor", processor)
