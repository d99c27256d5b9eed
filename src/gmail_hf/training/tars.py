"""Tars of images and texts: the files with the same key are one row, in any order."""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from .columns import USUAL, report_unmatched, texts_of, words_of
from .decoding import IMAGE_SUFFIXES

Place = tuple[int, int]  # offset and size of a member's content


def tar_rows(files: list[Path]) -> Dataset:
    """
    The samples of tars as rows.

    The columns are one image column for each kind of image (`real` for `0001.real.jpg`, `image` for `0001.jpg`),
    `image_id` (from a `.json` file, or else a key that is unique over all tars), and `captions` from a `.txt` file,
    one per line, or from a `.json` file. Samples that lack a column are left out, with a warning.

    Raises:
        ValueError: a tar holds a file twice or no images, or a `.json` or text file cannot be read.
    """
    samples = [(file, key, fields) for file in files for key, fields in _index(file).items()]
    columns = {column for _, _, fields in samples for column in fields}
    whole = [sample for sample in samples if sample[2].keys() == columns]
    lacking = (f"{key} of {file.name}" for file, key, fields in samples if fields.keys() != columns)
    report_unmatched(lacking, f"samples without all of {sorted(columns)} are")
    if not whole:
        raise ValueError(f"'{files[0]}' holds no sample with all of {sorted(columns) or 'images and texts'}.")
    named = unique_keys({"__key__": key, "__url__": str(file)} for file, key, _ in whole)
    keys = [row["__key__"] for row in named]
    images = sorted(columns - {"txt", "json", "cls"})
    features = {**dict.fromkeys(images, Image()), "image_id": Value("string")}
    captioned = "txt" in columns or bool(next(_contents(whole[:1])).get("captions"))
    features |= {"captions": List(Value("string"))} if captioned else {}
    features |= {"cls": Value("string")} if "cls" in columns else {}

    def rows() -> Iterator[dict[str, Any]]:
        for key, row in zip(keys, _contents(whole), strict=True):
            yield {name: {"image_id": key, **row}.get(name) for name in features}

    stamps = [(str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    try:
        return Dataset.from_generator(rows, features=Features(features), fingerprint=Hasher.hash(stamps))
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # it names the file
            raise error.__cause__ from None
        raise


def _index(file: Path) -> dict[str, dict[str, Place]]:
    """The members of a tar by key and column."""
    found: dict[str, dict[str, Place]] = {}
    with tarfile.open(file) as tar:
        for member in tar:
            folder, name = os.path.split(member.name)
            stem, _, field = name.partition(".")
            part, _, kind = field.lower().rpartition(".")
            column = (part or "image") if f".{kind}" in IMAGE_SUFFIXES else kind
            if not member.isfile() or not stem or not (column != kind or kind in ("txt", "json", "cls")):
                continue
            places = found.setdefault(os.path.join(folder, stem), {})
            if column in places:
                raise ValueError(f"'{file}' holds two files for '{column}' of the key '{stem}', such as '{name}'.")
            places[column] = (member.offset_data, member.size)
    return found


def _contents(samples: list[tuple[Path, str, dict[str, Place]]]) -> Iterator[dict[str, Any]]:
    """The columns of samples, including the captions and the id from a `.json` file."""
    for file, group in groupby(samples, key=lambda sample: sample[0]):
        with tarfile.open(file) as tar:
            for _, key, places in group:
                row: dict[str, Any] = {}
                for column, (offset, size) in places.items():
                    tar.fileobj.seek(offset)
                    content = tar.fileobj.read(size)
                    if column == "json":
                        row = {**_described(content, f"'{key}.json' of '{file}'"), **row}
                    elif column in ("txt", "cls"):
                        text = utf8_text(content, f"'{key}.{column}' of '{file}'")
                        row |= {"captions": text.splitlines()} if column == "txt" else {"cls": text.strip()}
                    else:
                        row[column] = {"bytes": content, "path": None}
                yield row


def utf8_text(content: bytes, where: str) -> str:
    """
    Decode the content of a text file, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8. The message begins with `where`.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 text: save it as UTF-8.") from None


def _described(content: bytes, where: str) -> dict[str, Any]:
    """Captions and id in a `.json` file."""
    try:
        values = json.loads(content, parse_float=str)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
    found = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        role = next((role for role in ("caption", "image_id") if words_of(name) in USUAL[role]), None)
        if role == "caption":
            if "captions" in found:
                raise ValueError(f"{where} has several captions: keep one of {list(values)}.")
            found["captions"] = [text for text in texts_of(value) if text is not None]
        elif role and value is not None:
            found["image_id"] = str(value)
    return found


def unique_keys(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """
    Make the keys of a webdataset unique over all shards, by prefixing repeated keys with the name of their shard.

    Raises:
        ValueError: a shard has a key twice.
    """
    seen: set[str] = set()
    for row in rows:
        key = row["__key__"]
        if key in seen:
            key = f"{Path(row['__url__']).stem}/{key}"
        if key in seen:
            raise ValueError(f"'{row['__url__']}' has the key '{row['__key__']}' twice.")
        seen.add(key)
        yield {**row, "__key__": key}
