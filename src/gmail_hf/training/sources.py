"""Rows of images and captions from common files and folders, or from the Hub."""

import glob
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Image, List, concatenate_datasets, load_dataset
from datasets.data_files import (
    DEFAULT_PATTERNS_ALL,
    DEFAULT_PATTERNS_SPLIT_IN_FILENAME,
    DataFilesDict,
    EmptyDatasetError,
    get_data_patterns,
)
from transformers.utils import logging

from ..publishing.provenance import local_path
from .columns import IMAGE_NAMES, USUAL, words_of
from .decoding import IMAGE_SUFFIXES
from .layouts import (
    BUILDERS,
    annotated_images,
    annotations,
    captioned_images,
    has_captions,
    read_files,
    subfolders,
    suffix_of,
    two_folders,
)

logger = logging.get_logger(__name__)


def load_rows(
    name: str,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    any_split: bool = False,
    images: bool = True,
) -> Dataset:
    """
    Load the rows of a data set.

    Args:
        name: a Hub id; a folder that `save_to_disk` wrote; a CSV, TSV, JSON, JSONL, parquet, Arrow or webdataset (tar)
            file, a glob of them, or a folder of them, with or without images; COCO's caption annotations or Karpathy's
            split file; a folder of images in class folders; a folder of images and `.txt` files of the same names; a
            folder with one subfolder of photographs and one of generated images of the same names, with captions in
            `.txt` files or in a table.
        split: the split, or a part of it such as `train[:10%]`; a source without splits has the split `train`.
        config_name, revision: configuration and revision of a data set on the Hub.
        any_split: use the only split of a source, regardless of its name.
        images: replace paths of images by images.

    Returns:
        The columns of the source. Columns of image paths, or of lists of them, become columns of images or of lists of
        images. Paths are relative to the file that contains them, or else to the working directory. `split` of the
        result is the split that was read.

    Raises:
        FileNotFoundError: `name` or the image of a row does not exist.
        ConnectionError: a Hub id cannot be read.
        ValueError: the split is unknown, or there is no data.
    """
    if (paths := matching_files(name)) is not None:
        if not paths:
            raise FileNotFoundError(f"No data set at '{name}': no file matches.")
        splits = {"train": paths}
    else:
        path = local_path(name, "data set")
        if path is not None and "::" in str(path.resolve()):
            raise ValueError(f"datasets cannot read paths with '::', such as '{path.resolve()}': rename the folder.")
        if path is None:
            return _from_hub(name, split, config_name, revision, any_split)
        if path.is_dir() and any((path / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(path))
            splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        elif path.is_file():
            content = annotations(path)
            splits = {"train": [path]} if content is None else annotated_images(content, path)
        else:
            splits = _folder(path)
    asked, split = split, split.partition("[")[0]
    if split not in splits:
        if not any_split or len(splits) > 1:
            raise ValueError(f"'{name}' has no split '{split}'; it has {[str(known) for known in splits]}.")
        split = next(iter(splits))
    rows = splits[split](images) if callable(splits[split]) else splits[split]
    if isinstance(rows, Dataset) and rows.format["type"] is not None:  # `save_to_disk` saves the format, too
        rows = rows.with_format(None)
    if isinstance(rows, Dataset) and not isinstance(splits, DatasetDict):
        split = rows.split or split  # a part of a DatasetDict may still name the split that it was made from
    parts = [(Path(name, "rows"), rows)] if isinstance(rows, Dataset) else read_files(rows, split)
    parts = [resolve_images(part, file) if images else part for file, part in parts]
    rows = parts[0] if len(parts) == 1 and parts[0].split == split else concatenate_datasets(parts, split=split)
    return rows if "[" not in asked else _sliced(rows, asked)


def _sliced(rows: Dataset, asked: str) -> Dataset:
    """The part of a split that datasets' notation selects, such as `train[:10%]`."""
    ranges = datasets.ReadInstruction.from_spec(asked).to_absolute({asked.partition("[")[0]: len(rows)})
    if all(part.from_ >= part.to for part in ranges):
        raise ValueError(f"'{asked}' selects none of the {len(rows)} rows of the split: choose another range.")
    return concatenate_datasets([rows.select(range(part.from_, part.to)) for part in ranges], split=rows.split)


def matching_files(name: str) -> list[Path] | None:
    """The files that a glob matches, in order; None for another name."""
    if not glob.has_magic(name) or Path(name).exists():
        return None
    return [Path(path) for path in sorted(glob.glob(name, recursive=True))]


def _from_hub(name: str, split: str, config_name: str | None, revision: str | None, any_split: bool) -> Dataset:
    try:
        available = datasets.get_dataset_split_names(name, config_name, revision=revision)
    except ValueError:  # an unknown configuration; the message lists the known ones
        raise
    except Exception as error:  # HTTP errors differ between versions of huggingface_hub
        raise ConnectionError(
            f"'{name}' is not a local path and cannot be read from the Hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Check the name, your connection and `hf auth login`."
        ) from error
    if any_split and len(available) == 1:
        split = available[0]
    if split.partition("[")[0] not in available:
        raise ValueError(f"'{name}' has no split '{split}'; it has {available}.")
    return load_dataset(name, config_name, split=split, revision=revision)


def _folder(path: Path) -> dict[str, Dataset | list[Path] | Callable[[bool], Dataset]]:
    """The splits of a folder, each as rows, as a list of files, or as a function that returns rows."""
    paired = {"train" if folder == path else folder.name: two_folders(folder) for folder in (path, *subfolders(path))}
    if any(paired.values()):
        return {split: rows for split, rows in paired.items() if rows}
    try:  # splits follow from the names of files and folders, as in a repository on the Hub
        base = glob.escape(str(path.resolve()))
        patterns = get_data_patterns(base)
        files = _matches(patterns, base)
        if all(found == DEFAULT_PATTERNS_SPLIT_IN_FILENAME.get(split) for split, found in patterns.items()):
            listed = {file for names in files.values() for file in names}
            every = _matches(DEFAULT_PATTERNS_ALL, base)
            unlisted = {file for file in every["train"] if file not in listed}
            if _has_images(unlisted) and not any(suffix_of(file) in BUILDERS for file in listed):
                patterns, files = DEFAULT_PATTERNS_ALL, every  # train-3.png may show a train
    except EmptyDatasetError:
        patterns, files = {}, {}
    # If splits are folders of images, tables are next to these folders or, like COCO's annotations, in their own.
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
    if any(_has_images(names) for names in files.values()):
        return dict(load_dataset("imagefolder", data_dir=base, data_files=patterns))
    raise ValueError(f"'{path}' contains no data: it has neither {', '.join(sorted(BUILDERS))} files nor images.")


def _has_images(files: Iterable[Path]) -> bool:
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in files)


def _matches(patterns: dict[str, list[str]], base: str) -> dict[str, list[Path]]:
    found = DataFilesDict.from_patterns(patterns, base_path=base)
    return {str(split): [Path(file) for file in names] for split, names in found.items()}


def _split_of(file: Path) -> str:
    """The split in a file name such as `captions_val2017.json`; `train` by default."""
    words = re.findall("train|val|dev|test", file.stem.lower())
    return "train" if not words else "validation" if words[0] in ("val", "dev") else words[0]


def _json_files(splits: dict[str, list[Path]]) -> dict[str, Any]:
    """JSON files of rows, or the rows of COCO's captions, whose folder also contains other annotations."""
    annotated: dict[str, Callable[[bool], Dataset]] = {}
    for split, files in splits.items():
        for file in files:
            content = annotations(file)
            if content and has_captions(content):
                found = annotated_images(content, file)
                annotated |= found if len(found) > 1 else {split: next(iter(found.values()))}
    return annotated or splits


def resolve_images(rows: Dataset, file: Path) -> Dataset:
    """
    Replace columns of image paths or bytes by columns of images, without copying bytes.

    Args:
        rows: the data set.
        file: the file that contains the paths.

    Raises:
        FileNotFoundError: the image of a row does not exist. If the first image of a column does not exist and another
            column has images, the column stays text, with a warning.
    """
    rows = rows if rows._indices is None else rows.flatten_indices()
    mere_names = _mere_names(rows, file)
    for column, feature in rows.features.items() if len(rows) else ():
        values = rows.data.column(column)
        if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
            rows = rows.cast_column(column, Image()) if words_of(column) in IMAGE_NAMES else rows
            continue
        in_lists = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        inner = feature.feature if in_lists else feature
        cells = [chunk.flatten() if in_lists else chunk for chunk in values.chunks]
        if isinstance(inner, Image):
            content = [cell.field("bytes") for cell in cells]
            null = pa.scalar(None, pa.string())
            paths = [
                pc.if_else(part.is_valid(), null, cell.field("path").cast(pa.string()))
                for part, cell in zip(content, cells, strict=True)
            ]
            if all(part.null_count == len(part) for part in paths):
                continue
        elif column not in mere_names and _first_path(column, cells) is not None:
            paths = [cell.cast(pa.string()) for cell in cells]
            content = [pa.nulls(len(cell), pa.binary()) for cell in cells]
        else:
            continue
        # imagefolder removes this suffix, too
        name = "image" if column == "file_name" else column.removesuffix("_file_name")
        name = column if name in rows.column_names else name
        images, row = [], 0
        for chunk, part, texts in zip(values.chunks, content, paths, strict=True):
            owners = pc.list_parent_indices(chunk).to_pylist() if in_lists else range(len(chunk))
            found = [
                _found(path, row + owner, column, file) for owner, path in zip(owners, texts.to_pylist(), strict=True)
            ]
            fields = [part, pa.array(found, pa.string())]
            absent = pc.and_(*(field.is_null() for field in fields))
            cells = pa.StructArray.from_arrays(fields, ["bytes", "path"], mask=absent)
            if in_lists:
                ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(chunk), 0)).cast(pa.int32())
                offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
                cells = pa.ListArray.from_arrays(offsets, cells, mask=chunk.is_null())
            images.append(cells)
            row += len(chunk)
        features = Features({name: List(Image()) if in_lists else Image()})
        found = Dataset(pa.table({name: pa.chunked_array(images)}, schema=features.arrow_schema))
        others = [other for other in rows.column_names if other != column]
        rows = concatenate_datasets([rows.select_columns(others), found], axis=1) if others else found
    return rows


def _mere_names(rows: Dataset, file: Path) -> set[str]:
    """
    Columns with names of images that are no longer there, such as `filename` next to images whose bytes are in the
    rows. They stay text if another column has images that can be meant instead: of the same modality, or of none.
    """
    roles, absent = set(), {}
    for column, feature in rows.features.items():
        role = next((role for role in ("real_image", "generated_image") if words_of(column) in USUAL[role]), None)
        values = rows.data.column(column)
        in_lists = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        cells = [chunk.flatten() if in_lists else chunk for chunk in values.chunks]
        if isinstance(feature.feature if in_lists else feature, Image) or (
            role and (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type))
        ):
            roles.add(role)
        elif (path := _first_path(column, cells)) is not None:
            try:
                _found(path, 0, column, file)
                roles.add(role)
            except FileNotFoundError:
                absent[column] = (role, path)
    absent = {
        column: path
        for column, (role, path) in absent.items()
        if column not in USUAL and (roles if role is None else roles & {role, None})
    }
    for column, path in absent.items():
        logger.warning(f"Column '{column}' of '{file}' stays text, because its image '{path.strip()}' does not exist.")
    return set(absent)


def _first_path(column: str, cells: list[pa.Array]) -> str | None:
    """The first non-empty text of a column, if it is the path of an image; None for columns of ids and captions."""
    if column in USUAL["image_id"] or words_of(column) in USUAL["caption"]:
        return None
    for cell in cells:
        text = cell.type.value_type if pa.types.is_dictionary(cell.type) else cell.type
        if not any(check(text) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
            return None
        first = next((value.as_py() for value in cell if value.as_py()), None)
        if first is not None:
            suffix = Path(first.strip().partition("::")[0].partition("?")[0]).suffix.lower()
            return first if suffix in IMAGE_SUFFIXES else None
    return None


def _found(value: str | None, row: int, column: str, file: Path) -> str | None:
    """
    The path of an image relative to the folder of `file`, or else to the working directory. URLs that datasets reads,
    such as `hf://...` and `zip://inside.png::archive.zip`, are returned unchanged.
    """
    value = (value or "").strip()
    if not value:
        return None
    inside, chained, archive = value.partition("::")
    if chained and "://" not in archive:
        return f"{inside}::{_found(archive, row, column, file)}"
    if value.startswith("file://"):
        value = unquote(value.removeprefix("file://"))
    if "://" in value:
        return value
    for name in (value, value.replace("\\", "/")):  # for tables written on Windows
        for path in (file.parent / name, Path(name).expanduser()):
            if path.exists():
                return str(path.absolute())
    raise FileNotFoundError(
        f"Row {row} of '{file}' names '{value}' in column '{column}', which exists neither in '{file.parent}' nor in "
        "the working directory."
    )
