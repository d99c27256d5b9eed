"""Pairs from any source, and checks of a command before a long run."""

import os
import shutil
from pathlib import Path

from datasets import Dataset

from .columns import find_column, one_caption_each, pair_rows, with_ids
from .data import PAIR_COLUMNS
from .sources import load_rows


def load_pairs(
    name: str,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    max_samples: int | None = None,
    messages_column: str | None = None,
) -> Dataset:
    """
    A data set of pairs with the columns of [`data.PAIR_COLUMNS`].

    Args:
        name, split, config_name, revision: see [`sources.load_rows`].
        columns: the requested columns of [`data.PAIR_COLUMNS`], each with its name in the data set. A column that is
            mapped to itself may also have another usual name. Defaults to all columns.
        max_samples: keep only the first `max_samples` pairs.
        messages_column: a column of conversations. If the data set has it, rows are not repeated for each caption.

    Returns:
        Pairs with one caption each; a row with a list of captions becomes several rows. `image_id` is text. If the
        column is missing, it is the path of each real image, or else the row number. Rows of single real and generated
        images are paired by id or caption. Requested columns that the data set lacks are left out.

    Raises:
        FileNotFoundError: a path does not exist.
        ConnectionError: a Hub id cannot be read.
        ValueError: an unknown split, a missing column, several candidates for a column, or a row without an id.
    """
    dataset = as_pairs(load_rows(name, split, config_name, revision), name, columns, messages_column)
    return dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))


def as_pairs(
    dataset: Dataset, name: str, columns: dict[str, str] | None = None, messages_column: str | None = None
) -> Dataset:
    """Turn rows of [`sources.load_rows`] into pairs; arguments, result and errors as in [`load_pairs`]."""
    columns = dict(zip(PAIR_COLUMNS, PAIR_COLUMNS, strict=True)) if columns is None else columns
    dataset = rename_columns(dataset, {ours: theirs for ours, theirs in columns.items() if ours != theirs}, name)
    for role in columns:
        found = find_column(dataset, role)
        if found not in (None, role):
            dataset = dataset.rename_column(found, role)
    if "image_id" in columns:
        dataset = with_ids(dataset, name)
    if {"real_image", "generated_image"} & columns.keys():  # otherwise generated rows would pass for photographs
        dataset = pair_rows(dataset, name)
    if "caption" in columns and "caption" in dataset.column_names and messages_column not in dataset.column_names:
        dataset = one_caption_each(dataset)
    return dataset


def rename_columns(dataset: Dataset, columns: dict[str, str], name: str) -> Dataset:
    """
    Rename columns of a data set.

    Args:
        dataset: any data set.
        columns: current names by new names. An existing column with one of the new names is removed.
        name: the data set's name in error messages.

    Raises:
        ValueError: a column to be renamed is missing.
    """
    renames = {theirs: ours for ours, theirs in columns.items() if theirs != ours}
    missing = [theirs for theirs in renames if theirs not in dataset.column_names]
    if missing:
        raise ValueError(f"'{name}' has no column(s) {missing}; it has {dataset.column_names}.")
    replaced = [ours for ours in renames.values() if ours in dataset.column_names and ours not in renames]
    return dataset.remove_columns(replaced).rename_columns(renames)


def check_free_disk(path: str | os.PathLike, needed: int) -> None:
    """
    Refuse to start a run that would fill the disk.

    Args:
        path: a file or folder that the run will write.
        needed: bytes.

    Raises:
        OSError: the disk has less free space.
    """
    existing = next(parent for parent in [Path(path).absolute(), *Path(path).absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"'{path}' needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free. Free some space, choose "
            f"another folder, or keep fewer checkpoints (--save_total_limit)."
        )
