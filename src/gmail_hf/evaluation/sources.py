"""The data of benchmarks: streamed from the Hub, read from a local folder with the same layout, or bundled."""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, hf_hub_download
from PIL import Image as PILImage

from ..publishing.provenance import local_path
from ..training.columns import is_missing, paths_of
from ..training.data import BadImageError, column_names, decode_image, undecoded
from ..training.loading import as_pairs
from ..training.sources import load_rows
from ..training.tars import unique_keys
from .own_data import OWN_DATA, SPLITS, TEXTS, class_folders, class_rows, labelled_rows
from .registry import ALIGNMENT, LAYOUTS, RETRIEVAL, ZERO_SHOT, Benchmark, ZeroShotQuestions

SHAREGPT4V_FILE, SHAREGPT4V_ROWS = "share-captioner_coco_lcs_sam_1246k_1107.json", 1000


@dataclass(frozen=True)
class Source:
    """
    The data of a benchmark, with checked columns.

    Args:
        name (`str`): Hub id, folder, parquet file, or name of bundled data.
        revision (`str`): commit on the Hub. For local data, a hash of the files' names, sizes and times. For bundled
            data, the version of gmail-hf.
        split (`str`): the split.
        layout (`str`): a key of `LAYOUTS`.
        limit (`int` or None): number of rows to read, or None for all. Class folders and tables of labels are read in
            turn by class, configurations in turn, and other data from the start.
        columns (`tuple[str, ...]`): columns of the first row.
        read (`Callable`): `read()` iterates over the rows, with images undecoded.
        lines (`Callable`): `lines(file)` returns the non-empty lines of a text file of the data set.
        questions ([`ZeroShotQuestions`], *optional*): questions of the benchmark.
        per_class (`bool`): as in the benchmark.
        train, validation ([`Source`], *optional*): data to fit and tune a probe, see [`open_training`].
    """

    name: str
    revision: str
    split: str
    layout: str
    limit: int | None
    columns: tuple[str, ...]
    read: Callable[[], Iterator[dict[str, Any]]]
    lines: Callable[[str], list[str]]
    questions: ZeroShotQuestions | None = None
    per_class: bool = False
    train: "Source | None" = None
    validation: "Source | None" = None

    @property
    def image_column(self) -> str:
        return next(column for column in LAYOUTS[self.layout].images if column in self.columns)

    @property
    def has_pairs(self) -> bool:
        return self.layout == "pairs" and "generated_image" in self.columns


def open_source(
    benchmark: Benchmark, dataset: str | None = None, limit: int | None = None, any_split: bool = True
) -> Source:
    """
    Find the data of a benchmark and check its first row.

    Args:
        benchmark: see `get_benchmark`.
        dataset: a folder, a file or a Hub id to use instead of the benchmark's own data. A benchmark with captions
            accepts every path that [`load_pairs`] reads, and on the Hub pairs with its columns; one with classes also
            accepts a folder of class folders.
        limit: number of rows to read, see [`Source`]. Defaults to all.
        any_split: accept the only split of a data set under any name.

    Raises:
        FileNotFoundError: `dataset` looks like a path that does not exist.
        ConnectionError: the data cannot be read from the Hub.
        ValueError: the data are empty or lack the split or columns, or the benchmark is not on the Hub and needs
            `dataset`.
    """
    name = dataset or benchmark.dataset
    wanted = f"{benchmark.name} needs {LAYOUTS[benchmark.layout].description}"
    if name is None:
        raise ValueError(f"Pass the data with --dataset {benchmark.name}=FOLDER: {wanted}.")
    if benchmark.rows is not None and dataset is None:
        split, revision, read, lines = benchmark.split, f"gmail-hf {version('gmail-hf')}", benchmark.rows, _no_lines
    elif path := local_path(name, "data set"):
        split, read, lines, others = _local_rows(path, benchmark, any_split)
        revision = fingerprint(path, others)
    else:
        split, revision, read, lines = _hub_rows(name, benchmark, any_split)
    try:
        first = next(iter(read(limit)), None)
    except OSError as error:
        raise ConnectionError(f"'{name}' cannot be read: {error}") from error
    if first is None:
        raise ValueError(f"Split '{split}' of '{name}' is empty.")
    layout = benchmark.layout
    if layout != "classes" and RETRIEVAL in benchmark.tasks:
        layout = "pairs" if "real_image" in first else "captions" if "txt" in first else layout
    missing = [column for column in LAYOUTS[layout].columns if column not in first]
    if not any(column in first for column in LAYOUTS[layout].images):
        missing.append(" or ".join(LAYOUTS[layout].images))
    if missing:
        raise ValueError(f"'{name}' lacks the column(s) {missing}; it has {list(first)}. {wanted}.")
    found = Source(
        name,
        revision,
        split,
        layout,
        limit,
        columns=tuple(first),
        read=lambda: read(limit),
        lines=_nonempty(name, lines),
        questions=benchmark.questions,
        per_class=benchmark.per_class,
    )
    for file in LAYOUTS[layout].files:
        found.lines(file)
    return found


def tasks_of(benchmark: Benchmark, source: Source) -> tuple[str, ...]:
    """Return the benchmark's tasks for which the data have the columns."""
    absent = set() if source.has_pairs else {ALIGNMENT}
    if source.questions is not None and source.questions.column not in source.columns:
        absent.add(ZERO_SHOT)
    return tuple(task for task in benchmark.tasks if task not in absent)


def captions_of(row: dict[str, Any], source: Source) -> tuple[Any, list[str]]:
    """
    Return an image's id and captions from a row of the layouts `captions`, `sharegpt4v` and `pairs`.

    Raises:
        ValueError: there is no caption.
    """
    if source.layout == "pairs":
        image_id, captions = row["image_id"], [row["caption"]]
        if is_missing(image_id):
            raise ValueError(f"A row of '{source.name}' with the caption '{row['caption']}' has no 'image_id'.")
    elif source.layout == "sharegpt4v":
        # One line, as in Long-CLIP's evaluation.
        image_id, captions = row["image"]["path"], [row["conversations"][1]["value"].replace("\n", " ")]
    else:
        image_id, captions = row["__key__"], (row["txt"] or "").splitlines()
    captions = [caption for caption in captions if caption and caption.strip()]
    if not captions:
        raise ValueError(f"Image {image_id} of '{source.name}' has no caption.")
    return image_id, captions


def captioned_images(source: Source, captions: dict[Any, dict[str, None]]) -> Iterator[tuple[Any, Any]]:
    """Iterate over images, each once, as id and undecoded cell, and collect their unique captions in `captions`."""
    for row in source.read():
        image_id, written = captions_of(row, source)
        if image_id not in captions:
            captions[image_id] = {}
            yield image_id, row[source.image_column]
        captions[image_id].update(dict.fromkeys(written))


def read_image(cell: Any, where: str) -> PILImage.Image:
    """
    Read an RGB image from a cell of an image column, see `decode_image`.

    Raises:
        ValueError: the image cannot be read. The message begins with `where`.
    """
    try:
        return decode_image(cell)
    except BadImageError as error:
        raise ValueError(f"{where}: {error}.") from error


def fingerprint(path: str | os.PathLike, others: Iterable[Path] = ()) -> str:
    """
    Hash the names, sizes and times of the files at a path, to identify local data and models without a commit. The
    card is ignored, because it changes when scores are added. `others` are files elsewhere that belong to the data.
    """
    digest = hashlib.blake2b(digest_size=8)
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    names = {file: str(file.relative_to(path)) for file in files if file.name != "README.md"}
    for file, name in {**names, **{file: str(file) for file in others}}.items():
        stat = file.stat()
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"files {digest.hexdigest()}"


def _no_lines(file: str) -> list[str]:
    raise FileNotFoundError(file)


def _nonempty(name: str, lines: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    def read(file: str) -> list[str]:
        try:
            found = [line.strip() for line in lines(file) if line.strip()]
        except FileNotFoundError as error:
            raise ValueError(f"'{name}' has no file {file}.") from error
        if not found:
            raise ValueError(f"{file} of '{name}' is empty.")
        return found

    return read


def _local_rows(path: Path, benchmark: Benchmark, any_split: bool) -> tuple[str, Callable, Callable, list[Path]]:
    """Return split, `read` and `lines` of local data, and the files outside of `path` that belong to them."""
    folder = (path if path.is_dir() else path.parent).absolute()

    def lines(file: str) -> list[str]:
        return folder.joinpath(file).read_text(encoding="utf-8-sig").splitlines()

    annotations = path / SHAREGPT4V_FILE
    if benchmark.layout == "sharegpt4v" and annotations.exists():
        return "first 1,000 rows", lambda limit: _sharegpt4v_rows(annotations, limit), lines, []
    if benchmark.layout == "urban1k" and (path / "caption").is_dir():
        return benchmark.split, lambda limit: islice(_urban1k_rows(path), limit), lines, []
    if any((path / benchmark.split).glob("*.tar")):
        tars = f"{glob.escape(str(path / benchmark.split))}/*.tar"
        return benchmark.split, _streamed(_webdataset(tars, benchmark.split)), lines, []
    if benchmark.layout == "classes":
        if (
            not any_split
            and not (path / benchmark.split).is_dir()
            and any(class_folders(path, name) for name in SPLITS)
        ):
            raise ValueError(f"'{path}' has no folder '{benchmark.split}'.")
        if class_folders(path, benchmark.split):
            return *class_rows(path, benchmark.split, lines), []
    if benchmark.layout in ("mmmu", "pope") and path.is_dir():
        return *_configured(str(path), benchmark, None, any_split), lines, []
    split, read, lines_of_rows, images = _table_rows(str(path), benchmark, lines, any_split)
    texts = [folder / file for file in TEXTS] if benchmark.layout == "classes" else []
    known = {path.absolute(), path.resolve()}
    others = [file for file in (*texts, *images) if known.isdisjoint((file, *file.parents)) and file.exists()]
    return split, read, lines_of_rows, others


def _table_rows(
    name: str,
    benchmark: Benchmark,
    lines: Callable[[str], list[str]],
    any_split: bool,
    revision: str | None = None,
) -> tuple[str, Callable, Callable, list[Path]]:
    """Read images with labels or captions in any format of `load_rows`. The last result lists the image files."""
    rows = load_rows(name, benchmark.split, revision=revision, any_split=any_split)
    split = str(rows.split or benchmark.split)
    named = {path for column in rows.column_names for path in paths_of(rows, column) if path}
    images = sorted({Path(path.rpartition("::")[2]) for path in named})  # the archive of zip://1.png::images.zip
    if benchmark.layout == "classes":
        return split, *labelled_rows(rows, name, lines), images
    if RETRIEVAL in benchmark.tasks:
        rows = as_pairs(rows, name)
    return split, _streamed(rows), lines, images


def _hub_rows(name: str, benchmark: Benchmark, any_split: bool) -> tuple[str, str, Callable, Callable]:
    try:
        about = HfApi().dataset_info(name)
    except Exception as error:  # the HTTP client and its errors differ between versions of huggingface_hub
        raise ConnectionError(
            f"'{name}' cannot be reached on the Hub ({type(error).__name__}: {str(error).splitlines()[0]}). Check the "
            f"name, your connection and `hf auth login`, or pass local data: --dataset {benchmark.name}=FOLDER."
        ) from error
    files, revision = {sibling.rfilename for sibling in about.siblings}, about.sha

    def lines(file: str) -> list[str]:
        if file not in files:
            raise FileNotFoundError(file)
        path = hf_hub_download(name, file, repo_type="dataset", revision=revision)
        return Path(path).read_text(encoding="utf-8").splitlines()

    if any(file.startswith(f"{benchmark.split}/") and file.endswith(".tar") for file in files):
        shards = f"hf://datasets/{name}@{revision}/{benchmark.split}/*.tar"
        return benchmark.split, revision, _streamed(_webdataset(shards, benchmark.split)), lines
    if benchmark.source == OWN_DATA:
        split, read, lines, _ = _table_rows(name, benchmark, lines, any_split, revision)
        return split, revision, read, lines
    split, read = _configured(name, benchmark, revision, any_split)
    return split, revision, read, lines


def _webdataset(shards: str, split: str) -> datasets.IterableDataset:
    return datasets.load_dataset("webdataset", data_files={split: shards}, split=split, streaming=True)


def _configured(name: str, benchmark: Benchmark, revision: str | None, any_split: bool) -> tuple[str, Callable]:
    """
    Read the rows of all configurations of a data set that have the split. `config_name` is a row's configuration.
    """
    configs = datasets.get_dataset_config_names(name, revision=revision)
    splits = {config: datasets.load_dataset(name, config, revision=revision, streaming=True) for config in configs}
    # POPE has all rows twice: in the split `test` of one configuration, and in three splits of another one.
    first = next((parts for parts in splits.values() if benchmark.split in parts), splits[configs[0]])
    split = _choose(first, benchmark, name, any_split)

    def rows_of(config: str) -> Iterator[dict[str, Any]]:
        return ({**row, "config_name": config} for row in undecoded(splits[config][split]))

    def read(limit: int | None) -> Iterator[dict[str, Any]]:
        streams = [rows_of(config) for config, parts in splits.items() if split in parts]
        if limit is None:
            return chain.from_iterable(streams)
        return islice((row for turn in zip_longest(*streams) for row in turn if row is not None), limit)

    return split, read


def _choose(splits: dict[str, Any], benchmark: Benchmark, name: str, any_split: bool) -> str:
    if benchmark.split in splits:
        return benchmark.split
    if len(splits) > 1 or not any_split:
        raise ValueError(f"'{name}' has no split '{benchmark.split}'; it has {list(splits)}.")
    return next(iter(splits))


def _streamed(rows: datasets.Dataset | datasets.IterableDataset) -> Callable:
    rows = undecoded(rows)
    keyed = "__key__" in column_names(rows)
    return lambda limit: islice(unique_keys(rows) if keyed else iter(rows), limit)


def _sharegpt4v_rows(annotations: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    count = SHAREGPT4V_ROWS if limit is None else min(limit, SHAREGPT4V_ROWS)
    for row in islice(_json_items(annotations), count):
        yield {**row, "image": {"bytes": None, "path": str(annotations.parent / row["image"])}}


def _urban1k_rows(path: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((path / "caption").glob("*.txt")):
        # The first line, as in Long-CLIP's evaluation.
        caption = next(iter(file.read_text(encoding="utf-8").splitlines()), "")
        image = {"bytes": None, "path": str(path / "image" / f"{file.stem}.jpg")}
        yield {"__key__": file.stem, "txt": caption, "image": image}


def _json_items(path: Path) -> Iterator[Any]:
    """Iterate over the items of a JSON file with one list without loading all of it: ShareGPT4V's has 1.5 GB."""
    decoder, buffer = json.JSONDecoder(), ""
    with open(path, encoding="utf-8") as file:
        file.read(1)  # the opening bracket
        while True:
            try:
                item, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError:
                chunk = file.read(2**20)
                if not chunk:
                    if buffer.strip() not in ("", "]"):
                        raise ValueError(f"'{path}' is not a list of JSON objects, or is truncated.") from None
                    return
                buffer = (buffer + chunk).lstrip(" \n\r\t,")
                continue
            yield item
            buffer = buffer[end:].lstrip(" \n\r\t,")
