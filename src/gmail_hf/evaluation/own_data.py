"""Benchmarks on the user's own data: images in class folders, with labels, or with captions."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from ..publishing.provenance import local_path
from ..training.columns import LABELS, find_column, is_missing
from ..training.data import undecoded
from ..training.decoding import IMAGE_SUFFIXES
from ..training.layouts import BUILDERS, subfolders, suffix_of
from ..training.sources import load_rows
from .registry import ALIGNMENT, CAPTIONING, LAYOUTS, PROBE, RETRIEVAL, ZERO_SHOT, Benchmark

CLASS_NAMES, TEMPLATES = LAYOUTS["classes"].files
TEXTS = (CLASS_NAMES, TEMPLATES, "templates.txt")
DEFAULT_TEMPLATE = "a photo of a {c}."
OWN_DATA = "own data"
SPLITS = {"train", "val", "valid", "validation", "dev", "test"}  # folders with these names are no classes
Lines = Callable[[str], list[str]]


def own_benchmark(name: str, dataset: str) -> Benchmark:
    """
    Create a benchmark on a user's own data: classification for images in class folders or with labels; retrieval,
    captioning and alignment for images with captions.

    Args:
        name: name in results.
        dataset: a folder or file, see [`open_source`], or a Hub id.

    Raises:
        FileNotFoundError: `dataset` looks like a path that does not exist.
        ConnectionError, ValueError: see [`load_rows`].
    """
    path, split = local_path(dataset, "data set"), "test"
    if path is None or not _holds_classes(path):
        tars = path is not None and any((path / split).glob("*.tar"))  # images with captions
        rows = None if tars else load_rows(dataset, split, any_split=True, images=path is not None)
        if rows is None or _label_column(rows) is None:
            return Benchmark(
                name, name, (RETRIEVAL, CAPTIONING, ALIGNMENT), "captions", None, split, None, source=OWN_DATA
            )
    return Benchmark(name, name, (ZERO_SHOT, PROBE), "classes", None, split, paper=None, source=OWN_DATA)


def _label_column(rows: Dataset) -> str | None:
    """Return the only label column of rows without captions, or None if there is none."""
    if find_column(rows, "caption") is not None:
        return None
    found = [column for column in rows.column_names if column.lower() in LABELS]
    if len(found) > 1:
        raise ValueError(f"Several columns may contain the labels: {found}. Keep only one of them.")
    return found[0] if found else None


def labelled_rows(rows: Dataset, name: str, lines: Lines) -> tuple[Callable, Lines]:
    """
    Read images with a label column. Labels are line numbers of classnames.txt, or names: its lines in any order, or
    other names, which its lines follow in alphabetical order. Without classnames.txt, the classes are the names in
    alphabetical order. A `ClassLabel` is its names, in its own order. A limit takes rows of each label in turn.

    Returns:
        `read` and `lines` of a [`Source`].

    Raises:
        ValueError: there is no image or label column, a row has no label or a list, numeric labels have no names,
            or classnames.txt lacks a label and does not have one line per label in their order.
    """
    label, image = _label_column(rows), find_column(rows, "real_image")
    if label is None or image is None or not isinstance(rows.features[image], Image):
        raise ValueError(f"'{name}' has no column of {'images' if label else 'labels'}; it has {rows.column_names}.")
    feature, values = rows.features[label], rows[label][:]
    missing = next((row for row, value in enumerate(values) if is_missing(value) or value == -1), None)
    if missing is not None:
        raise ValueError(f"Row {missing} of '{name}' has no '{label}'.")
    if any(isinstance(value, (list, dict)) for value in values):
        raise ValueError(f"Column '{label}' of '{name}' must hold one label per row, not lists.")
    names, listed = _lines_of((CLASS_NAMES,), lines), getattr(feature, "names", None)
    numbers = [re.fullmatch(r"(\d+)(\.0*)?", str(value)) for value in values]  # tables may hold 7 as 7.0
    if listed or not all(numbers):
        texts = [feature.int2str(value) if listed else str(value) for value in values]
        classes = listed or sorted(set(texts))
        names = names or classes
        numbered = _numbers(classes, names, f"labels of '{name}'")
        numbers = [numbered[text] for text in texts]
    else:
        numbers = [int(number[1]) for number in numbers]
    if not names:
        raise ValueError(
            f"Column '{label}' of '{name}' has numbers without names: add {CLASS_NAMES} next to the data, with one "
            "line per class, starting at 0."
        )
    images = undecoded(rows.select_columns([image]))

    def read(limit: int | None) -> Iterator[dict[str, Any]]:
        order, chosen = range(len(numbers)), images
        if limit is not None:
            order = _in_turn(numbers)[:limit]
            chosen = images.select(order)
        return ({"image": row[image], "cls": numbers[place]} for row, place in zip(chosen, order, strict=True))

    return read, _texts(names, lines)


def _in_turn(labels: Sequence[int]) -> list[int]:
    """Return the numbers of all rows: the first row of each label, then the second one of each, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for label in labels:
        turns.append(seen[label])
        seen[label] += 1
    return sorted(range(len(turns)), key=turns.__getitem__)


def _numbers(classes: list[str], names: list[str], what: str) -> dict[str, int]:
    """
    Return the number of each class, its row in `names`. If all classes are in `names`, where `_` equals a space, order
    and further names do not matter. Otherwise `names` are other words for the classes, in the same order.

    Args:
        what: what the classes are, for the error.

    Raises:
        ValueError: `names` are neither.
    """
    lines = [name.strip().replace("_", " ") for name in names]
    rows = {line: number for number, line in enumerate(lines)}
    words = [label.strip().replace("_", " ") for label in classes]
    if len(rows.keys() & set(words)) == len(words):
        return {label: rows[word] for label, word in zip(classes, words, strict=True)}
    pairs = [*zip(words, lines, strict=False)]
    if len(lines) != len(words) or any(word in rows and word != line for word, line in pairs):
        lacking = [label for label, word in zip(classes, words, strict=True) if word not in rows]
        order = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
        raise ValueError(
            f"{CLASS_NAMES} has {len(names)} lines for {len(classes)} {what}, and lacks {lacking[:5]}: list all of "
            f"them, or write one other name per line in the order {order}."
        )
    return {label: number for number, label in enumerate(classes)}


def _texts(names: list[str], lines: Lines) -> Lines:
    """Return a function that gives the class names and the templates, or the default template."""
    templates = _lines_of(TEXTS[1:], lines) or [DEFAULT_TEMPLATE]
    return {CLASS_NAMES: [name.replace("_", " ") for name in names], TEMPLATES: templates}.__getitem__


def _lines_of(files: tuple[str, ...], lines: Lines) -> list[str]:
    """Return the non-empty lines of the first of these files that exists."""
    for file in files:
        try:
            return [line for line in lines(file) if line.strip()]
        except FileNotFoundError:
            continue
    return []


def class_folders(path: Path, split: str) -> list[Path]:
    """Return the class folders in a folder or in its split's folder. Some of them may have no images."""
    top = path / split if (path / split).is_dir() else path
    folders = subfolders(top) if top.is_dir() else []
    if top == path and SPLITS.issuperset(folder.name for folder in folders):
        return []
    return folders if sum(bool(_images_in(folder)) for folder in folders) > 1 else []


def _images_in(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _holds_classes(path: Path) -> bool:
    if (path / CLASS_NAMES).exists():
        return True
    folders = class_folders(path, "test")
    tables = [file for file in path.iterdir() if suffix_of(file) in BUILDERS] if folders else []
    return bool(folders) and not tables and not any(next(folder.rglob("*.txt"), None) for folder in folders)


def class_rows(path: Path, split: str, lines: Lines) -> tuple[str, Callable, Lines]:
    """
    Read images in class folders, with a limit in turn from each folder. If there is a classnames.txt, its lines are
    the names of the folders in any order, or name the folders in alphabetical order.

    Raises:
        ValueError: classnames.txt lacks a folder and does not have one line per folder in their order.
    """
    folders = class_folders(path, split)
    names = _lines_of((CLASS_NAMES,), lines) or [folder.name for folder in folders]
    numbered = _numbers([folder.name for folder in folders], names, f"class folders of '{path}'")

    def read(limit: int | None) -> Iterator[dict[str, Any]]:
        rows = [
            {"image": {"bytes": None, "path": str(image)}, "cls": numbered[folder.name]}
            for folder in folders
            for image in _images_in(folder)
        ]
        if limit is not None:
            rows = [rows[row] for row in _in_turn([row["cls"] for row in rows])[:limit]]
        return iter(rows)

    return split if (path / split).is_dir() else "all", read, _texts(names, lines)
