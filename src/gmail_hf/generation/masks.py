"""The mask: a file with the rows of a data set to keep, which is checked against the data."""

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
from ..training.decoding import digest_of

COLUMNS = ("row", "file_name", "caption", "kept", "reason", "copy_of", "clip_score", "digest")
METADATA = b"gmail_hf"
AHEAD = 256  # images per batch of reading

logger = logging.get_logger(__name__)


def write_mask(mask: pa.Table, path: str | os.PathLike, settings: dict[str, Any]) -> None:
    """Write the mask of [`curate`] atomically as parquet, with `settings` as JSON in its metadata."""
    mask = mask.replace_schema_metadata({METADATA: json.dumps(settings)})
    with replacing(path) as partial:
        pq.write_table(mask, partial)


def read_mask(path: str | os.PathLike) -> pa.Table:
    """
    Read a mask of [`write_mask`].

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a mask.
    """
    try:
        mask = pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no mask '{path}': write it with gmail-hf curate.") from None
    except pa.ArrowInvalid:
        mask = None
    if mask is None or METADATA not in (mask.schema.metadata or {}) or mask.column_names != list(COLUMNS):
        raise ValueError(f"'{path}' is not a mask: pass the mask.parquet of gmail-hf curate.")
    return mask


def apply_mask(
    dataset: Dataset, path: str | os.PathLike, column: str = "generated_image", name: str = "The data set"
) -> Dataset:
    """
    Select the rows of a data set that a mask keeps.

    Args:
        dataset: the rows that were curated, or the first of them.
        path: path of the mask.
        column: column with the generated images, which are compared with the digests in the mask.
        name: name of the data set in error messages.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a mask, it belongs to other images, or it keeps none of the rows.
    """
    mask = read_mask(path)
    if not isinstance(dataset.features.get(column), Image):
        raise ValueError(f"{name} needs a column '{column}' with one image per row, to apply the mask '{path}'.")
    again = "Run gmail-hf curate on this data again."
    if len(dataset) > len(mask):
        raise ValueError(f"{name} has {len(dataset)} rows, but '{path}' is for {len(mask)} rows. {again}")
    digests = read_all(undecoded(dataset), column, digest_of, "Comparing with the mask")
    for row, (found, expected) in enumerate(zip(digests, mask["digest"].to_pylist(), strict=False)):
        if found != expected:
            raise ValueError(f"Row {row} of {name} has another image than row {row} of '{path}'. {again}")
    kept = np.flatnonzero(mask["kept"].to_numpy()[: len(dataset)])
    if not len(kept):
        raise ValueError(f"'{path}' keeps none of the {len(dataset)} rows of {name}: curate with other thresholds.")
    logger.info(f"{name}: '{path}' keeps {len(kept)} of {len(dataset)} rows.")
    return dataset.select(kept)


def read_all(images: Dataset, column: str, read: Callable[[Any], Any], desc: str) -> list[Any]:
    """Call `read` for each image of a column, in threads, and return the results."""
    cells: Iterator[Any] = (row[column] for row in images.select_columns([column]))
    found: list[Any] = []
    bar = tqdm(total=len(images), desc=desc, unit="image", disable=not is_progress_bar_enabled())
    with ThreadPoolExecutor() as pool, bar:
        while batch := list(islice(cells, AHEAD)):
            found += pool.map(read, batch)
            bar.update(len(batch))
    return found
