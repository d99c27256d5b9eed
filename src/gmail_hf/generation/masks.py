"""The file that says which rows of a data set to keep, and its check against the data."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image, is_progress_bar_enabled
from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import replacing
from ..training.data import undecoded
from ..training.decoding import image_content

COLUMNS = ("row", "file_name", "caption", "kept", "reason", "copy_of", "clip_score", "digest")
METADATA = b"gmail_hf"
AHEAD = 256  # images read ahead

logger = logging.get_logger(__name__)


def write_mask(mask: pa.Table, path: str | os.PathLike, settings: dict[str, Any]) -> None:
    """Write the mask of [`curate`] as parquet, whole or not at all, with `settings` as JSON in its metadata."""
    mask = mask.replace_schema_metadata({METADATA: json.dumps(settings)})
    with replacing(path) as partial:
        pq.write_table(mask, partial)


def read_mask(path: str | os.PathLike) -> pa.Table:
    """
    A mask that [`write_mask`] wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is something else.
    """
    try:
        mask = pq.read_table(path, partitioning=None)
    except pa.ArrowInvalid:
        mask = None
    if mask is None or METADATA not in (mask.schema.metadata or {}) or mask.column_names != list(COLUMNS):
        raise ValueError(f"'{path}' is no mask that gmail-hf curate wrote.")
    return mask


def apply_mask(
    dataset: Dataset, path: str | os.PathLike, column: str = "generated_image", name: str = "The data set"
) -> Dataset:
    """
    The rows of a data set that a mask keeps.

    Args:
        dataset: the rows that were curated, or the first of them.
        path: of the mask.
        column: with the generated images, whose content is compared with the mask's.
        name: of the data set, for errors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no mask, or belongs to other images; it keeps none of the rows.
    """
    mask = read_mask(path)
    if not isinstance(dataset.features.get(column), Image):
        raise ValueError(f"{name} has no column '{column}' with one image per row, which '{path}' could apply to.")
    again = "Run gmail-hf curate on this data again."
    if len(dataset) > len(mask):
        raise ValueError(f"{name} has {len(dataset)} rows, and '{path}' is for {len(mask)}. {again}")
    digests = read_all(undecoded(dataset), column, digest_of, "Comparing with the mask")
    for row, (found, expected) in enumerate(zip(digests, mask["digest"].to_pylist(), strict=False)):
        if found != expected:
            raise ValueError(f"Row {row} of {name} is not the image that '{path}' was made for. {again}")
    kept = np.flatnonzero(mask["kept"].to_numpy()[: len(dataset)])
    if not len(kept):
        raise ValueError(f"'{path}' keeps none of the {len(dataset)} rows of {name}.")
    logger.info(f"{name}: {len(kept)} of {len(dataset)} rows are kept by '{path}'.")
    return dataset.select(kept)


def digest_of(cell: Any) -> str:
    """A hash of the file of an image; empty if it cannot be read."""
    try:
        content = image_content(cell)
    except (OSError, TypeError):  # no file, no cell
        return ""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def read_all(images: Dataset, column: str, read: Callable[[Any], Any], desc: str) -> list[Any]:
    """What `read` returns for each image of a column; files are read in threads."""
    cells: Iterator[Any] = (row[column] for row in images.select_columns([column]))
    found: list[Any] = []
    bar = tqdm(total=len(images), desc=desc, unit="image", disable=not is_progress_bar_enabled())
    with ThreadPoolExecutor() as pool, bar:
        while batch := list(islice(cells, AHEAD)):
            found += pool.map(read, batch)
            bar.update(len(batch))
    return found
