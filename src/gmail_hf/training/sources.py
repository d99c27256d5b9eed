"""Rows of images and captions from any usual file or folder, or from the Hub, as they are written."""

import glob
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, concatenate_datasets, load_dataset
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from ..publishing.provenance import local_path
from .columns import IMAGE_NAMES, words_of
from .layouts import (
    BUILDERS,
    IMAGE_SUFFIXES,
    annotated_images,
    annotations,
    captioned_images,
    has_captions,
    read_files,
    subfolders,
    suffix_of,
    two_folders,
)


def load_rows(
    name: str,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    any_split: bool = False,
    images: bool = True,
) -> Dataset:
    """
    The rows of a data set, as they are written.

    Args:
        name: a Hub id; a folder that `save_to_disk` wrote; a CSV, TSV, JSON, JSONL, parquet, Arrow or webdataset (tar)
            file, a glob of them, or a folder that holds some, with or without images; COCO's caption annotations or
            Karpathy's split file; a folder of images in class folders; a folder of images and `.txt` files of the same
            names; a folder with one subfolder of photographs and one of generated images of the same names, with
            captions in `.txt` files or in a table.
        split: the split; a source without splits is `train`.
        config_name, revision: of a data set on the Hub.
        any_split: take the only split of a local source whatever its name.
        images: look for the images that rows name by path.

    Returns:
        Columns as they are written; columns of paths to images become columns of images. Paths are relative to the
        file that names them, or else to the working directory.

    Raises:
        FileNotFoundError: `name` or an image that a row names does not exist.
        ConnectionError: a Hub id that cannot be read.
        ValueError: an unknown split, or no data.
    """
    if glob.has_magic(name) and not Path(name).exists():
        paths = [Path(path) for path in sorted(glob.glob(name, recursive=True))]
        if not paths:
            raise FileNotFoundError(f"No data set at '{name}': no file matches.")
        splits = {"train": paths}
    else:
        path = local_path(name, "data set")
        if path is None:
            return _from_hub(name, split, config_name, revision)
        if path.is_dir() and any((path / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(path))
            splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        elif path.is_file():
            content = annotations(path)
            splits = {"train": [path]} if content is None else annotated_images(content, path)
        else:
            splits = _folder(path)
    if split not in splits:
        if not any_split or len(splits) > 1:
            raise ValueError(f"'{name}' has no split '{split}'; it has {[str(known) for known in splits]}.")
        split = next(iter(splits))
    rows = splits[split]
    parts = [(Path(name, "rows"), rows)] if isinstance(rows, Dataset) else read_files(rows, split)
    parts = [resolve_images(part, file) if images else part for file, part in parts]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _from_hub(name: str, split: str, config_name: str | None, revision: str | None) -> Dataset:
    try:
        available = datasets.get_dataset_split_names(name, config_name, revision=revision)
    except ValueError:  # of its configurations, which the message lists
        raise
    except Exception as error:  # the HTTP client and its errors differ between versions of huggingface_hub
        raise ConnectionError(
            f"'{name}' is no local path and cannot be read from the Hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Check the name, your connection and `hf auth login`."
        ) from error
    if split.partition("[")[0] not in available:
        raise ValueError(f"'{name}' has no split '{split}'; it has {available}.")
    return load_dataset(name, config_name, split=split, revision=revision)


def _folder(path: Path) -> dict[str, Dataset | list[Path]]:
    """The splits of a folder: rows, or the files that hold them."""
    paired = {"train" if folder == path else folder.name: two_folders(folder) for folder in (path, *subfolders(path))}
    if any(paired.values()):
        return {split: rows for split, rows in paired.items() if rows}
    try:  # splits follow from the names of files and folders, as in a repository on the Hub
        base = glob.escape(str(path.resolve()))
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except EmptyDatasetError:
        found = {}
    files = {str(split): [Path(file) for file in names] for split, names in found.items()}
    # Of folders of images by split, tables are next to them or, as COCO's annotations, in their own folder.
    if not any(suffix_of(file) in BUILDERS for names in files.values() for file in names):
        tables = [file for file in (*path.glob("*"), *path.glob("annotations/*.json")) if suffix_of(file) in BUILDERS]
        for table in sorted(tables):
            files.setdefault(_split_of(table), []).append(table)
    metadata = {split: [file for file in names if file.stem == "metadata"] for split, names in files.items()}
    for candidates in (metadata, files):
        for suffix in BUILDERS:
            chosen = {
                split: [file for file in names if suffix_of(file) == suffix] for split, names in candidates.items()
            }
            chosen = {split: names for split, names in chosen.items() if names}
            if suffix == ".json":
                chosen = _json_files(chosen)
            if chosen:
                return chosen
    captioned = {split: captioned_images(names) for split, names in files.items()}
    if any(captioned.values()):
        return {split: rows for split, rows in captioned.items() if rows}
    if any(file.suffix.lower() in IMAGE_SUFFIXES for names in files.values() for file in names):
        return dict(load_dataset("imagefolder", data_dir=base))
    raise ValueError(f"'{path}' holds no data: no file of {sorted(BUILDERS)} and no images.")


def _split_of(file: Path) -> str:
    """The split in a file's name, such as `captions_val2017.json`; `train` by default."""
    words = re.findall("train|val|dev|test", file.stem.lower())
    return "train" if not words else "validation" if words[0] in ("val", "dev") else words[0]


def _json_files(splits: dict[str, list[Path]]) -> dict[str, Any]:
    """JSON files of rows, or the rows of captions of COCO, whose folder holds annotations of other kinds too."""
    annotated: dict[str, Dataset] = {}
    for split, files in splits.items():
        for file in files:
            content = annotations(file)
            if content and has_captions(content):
                found = annotated_images(content, file)
                annotated |= found if len(found) > 1 else {split: next(iter(found.values()))}
    return annotated or splits


def resolve_images(rows: Dataset, file: Path) -> Dataset:
    """
    Columns of images in place of columns of their paths or bytes, without copying bytes.

    Args:
        rows: the data set.
        file: the file that names the images.

    Raises:
        FileNotFoundError: a row names an image that does not exist.
    """
    rows = rows if rows._indices is None else rows.flatten_indices()
    for column, feature in rows.features.items() if len(rows) else ():
        values = rows.data.column(column)
        if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
            rows = rows.cast_column(column, Image()) if words_of(column) in IMAGE_NAMES else rows
            continue
        if isinstance(feature, Image):
            content = [chunk.field("bytes") for chunk in values.chunks]
            null = pa.scalar(None, pa.string())
            paths = [
                pc.if_else(part.is_valid(), null, chunk.field("path").cast(pa.string()))
                for part, chunk in zip(content, values.chunks, strict=True)
            ]
            if all(part.null_count == len(part) for part in paths):
                continue
        elif _are_paths(values):
            paths = [chunk.cast(pa.string()) for chunk in values.chunks]
            content = [pa.nulls(len(chunk), pa.binary()) for chunk in values.chunks]
        else:
            continue
        # imagefolder too takes this ending off
        name = "image" if column == "file_name" else column.removesuffix("_file_name")
        name = column if name in rows.column_names else name
        cells, row = [], 0
        for part, chunk in zip(content, paths, strict=True):
            found = [_found(path, row + i, column, file) for i, path in enumerate(chunk.to_pylist())]
            fields = [part, pa.array(found, pa.string())]
            absent = pc.and_(*(field.is_null() for field in fields))
            cells.append(pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=absent))
            row += len(chunk)
        images = Dataset(pa.table({name: pa.chunked_array(cells)})).cast_column(name, Image())
        others = [other for other in rows.column_names if other != column]
        rows = concatenate_datasets([rows.select_columns(others), images], axis=1) if others else images
    return rows


def _are_paths(values: pa.ChunkedArray) -> bool:
    text = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not any(check(text) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return False
    first = next((value.as_py() for value in values if value.as_py()), "")
    return Path(first).suffix.lower() in IMAGE_SUFFIXES


def _found(value: str | None, row: int, column: str, file: Path) -> str | None:
    """The path of an image, relative to the folder of the file that names it, or else to the working directory."""
    if not value:
        return None
    for path in (file.parent / value, Path(value)):
        if path.exists():
            return str(path.absolute())
    raise FileNotFoundError(
        f"Row {row} of '{file}' names '{value}' in column '{column}', which exists neither in '{file.parent}' nor in "
        "the working directory."
    )
