"""Layouts without a builder in datasets: COCO's annotations, folders of images and texts, CSV read as text."""

import glob
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, Features, Image, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from .columns import USUAL, find_column, report_unmatched, texts_of, words_of
from .decoding import IMAGE_SUFFIXES
from .tars import tar_rows, utf8_text

# Builders of datasets by file type. In a folder with several types, the first one in this order holds the rows.
BUILDERS = {
    ".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset", ".jsonl": "json", ".ndjson": "json",
    ".csv": "csv", ".tsv": "csv", ".json": "json",
}  # fmt: skip
NAMING = (".jsonl", ".ndjson", ".csv", ".tsv", ".json")  # text files, which contain paths of images
KARPATHY_SPLITS = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}


def read_files(files: list[Path], split: str) -> Iterator[tuple[Path, Dataset]]:
    """The unchanged rows of files of one type. Text files are read one by one, each with its path."""
    suffixes = {suffix_of(file) for file in files}
    if len(suffixes) > 1 or not suffixes <= BUILDERS.keys():
        raise ValueError(f"'{files[0]}' is neither a folder nor a file of a known type: {', '.join(BUILDERS)}.")
    suffix = suffixes.pop()
    if suffix == ".tar":
        yield files[0], tar_rows(files)
        return
    for group in [[file] for file in files] if suffix in NAMING else [files]:
        options = {}
        try:
            if BUILDERS[suffix] == "csv":
                options = _csv_options(group[0], "\t" if suffix == ".tsv" else ",")
            paths = [glob.escape(str(file.resolve())) for file in group]
            rows = load_dataset(BUILDERS[suffix], data_files={split: paths}, split=split, **options)
        except (ValueError, DatasetGenerationError) as error:
            cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            if isinstance(cause, pd.errors.EmptyDataError) or "corresponds to no data" in str(cause):
                raise ValueError(f"'{group[0]}' is empty.") from None
            if isinstance(cause, UnicodeDecodeError):
                cause = "it is not UTF-8 text; save it as UTF-8"
            raise ValueError(f"'{group[0]}' cannot be read: {cause}.") from error
        names = {name: name.strip() for name in options.get("features", {}) if name != name.strip()}
        yield group[0], rows.rename_columns(names)


def _csv_options(file: Path, sep: str) -> dict[str, Any]:
    """
    Options to read all cells of a CSV as text, so that 007 is kept and ids next to empty cells do not become floats.

    Raises:
        ValueError: the first row has more fields than the header.
    """
    options = {"sep": sep, "keep_default_na": False, "encoding": "utf-8-sig", "dtype": "string"}
    first = pd.read_csv(file, nrows=1, **options)
    if len(first.columns) == 1:  # another separator, such as the semicolon of spreadsheets in Europe
        options["sep"] = next((found for found in ";\t|" if found in first.columns[0]), sep)
        first = pd.read_csv(file, nrows=1, **options)
    if not isinstance(first.index, pd.RangeIndex):
        raise ValueError(f"row 0 has more fields than the header; quote text that contains '{options['sep']}'")
    del options["dtype"]
    return {**options, "features": Features(dict.fromkeys(first.columns, Value("string")))}


def suffix_of(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def subfolders(path: Path) -> list[Path]:
    return [sub for sub in sorted(path.iterdir()) if sub.is_dir() and not sub.name.startswith(".")]


def two_folders(path: Path) -> Dataset | None:
    """Pairs of images with the same names in two subfolders, and their captions; None for another layout."""
    folders = subfolders(path)
    generated = [folder for folder in folders if words_of(folder.name) in USUAL["generated_image"]]
    if not generated and len(folders) == 2:
        generated = [folder for folder in folders if next(folder.rglob("*.txt"), None)]
    real = [folder for folder in folders if folder not in generated]
    if len(real) > 1:
        real = [folder for folder in real if words_of(folder.name) in USUAL["real_image"]]
    if not len(generated) == len(real) == 1:
        return None
    theirs, ours = (_images(folder.rglob("*"), folder) for folder in (real[0], generated[0]))
    if not theirs or not ours:
        return None
    both = [name for name in ours if name in theirs]
    tables = any(suffix_of(file) in BUILDERS for file in path.iterdir())
    if not both and not tables and words_of(generated[0].name) in USUAL["generated_image"]:
        raise ValueError(f"'{real[0]}' and '{generated[0]}' have no image names in common: pairs need equal names.")
    captions = {name: text for name in both if (text := _text(ours[name], theirs[name]))}
    captions = captions or _table_of_captions(path, {Path(name).name for name in (*ours, *theirs)})
    if captions is None:
        if both and not tables:
            raise ValueError(
                f"'{real[0]}' and '{generated[0]}' hold pairs without captions. Put the captions into .txt files with "
                "the names of the generated images, or into a table next to the two folders."
            )
        return None
    report_unmatched(
        (str(ours[name]) for name in ours if name not in theirs), "generated images without a partner are"
    )
    report_unmatched((str(theirs[name]) for name in theirs if name not in ours), "photographs without a partner are")
    texts = {name: captions.get(name, captions.get(Path(name).name)) for name in both}
    report_unmatched((name for name in both if not texts[name]), "pairs without a caption are")
    kept = [name for name in both if texts[name]]
    if not kept:
        raise ValueError(f"No pair of images with equal names in '{real[0]}' and '{generated[0]}' has a caption.")
    return _image_rows(
        {"real_image": [theirs[name] for name in kept], "generated_image": [ours[name] for name in kept]},
        captions=[texts[name] for name in kept],
        image_id=kept,
    )


def _table_of_captions(path: Path, names: set[str]) -> dict[str, list[str]] | None:
    """The captions by image name, from the only table in a folder; None if that table contains paths of images."""
    tables = [file for file in sorted(path.iterdir()) if suffix_of(file) in BUILDERS and suffix_of(file) != ".tar"]
    if len(tables) != 1:
        return None
    ((_, rows),) = read_files(tables, "train")
    caption = find_column(rows, "caption")
    cells = {column: rows[column][:] for column in rows.column_names if column != caption}
    keys = [column for column, values in cells.items() if any(_stem(value) in names for value in values)]
    # Numbers of rows may equal names of images by chance, file names do not.
    keys = [column for column in keys if any(_is_image_name(value) for value in cells[column])] or keys
    if caption is None or len(keys) != 1 or any(value and (path / str(value)).exists() for value in cells[keys[0]]):
        return None
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(_stem(row[keys[0]]), []).extend(text for text in texts_of(row[caption]) if text)
    return captions


def _is_image_name(value: Any) -> bool:
    return Path(str(value)).suffix.lower() in IMAGE_SUFFIXES


def _stem(value: Any) -> str:
    path = Path(str(value))
    return path.stem if _is_image_name(value) else path.name


def captioned_images(files: list[Path]) -> Dataset | None:
    """Images with `.txt` files of the same names; None if there are no such files."""
    if not any(file.suffix.lower() in IMAGE_SUFFIXES and file.with_suffix(".txt").exists() for file in files):
        return None
    images = _images(files, Path(files[0].anchor))
    texts = {image: _text(image) for image in images.values()}
    report_unmatched((image for image, text in texts.items() if text is None), "images without a text are")
    kept = {image: text for image, text in texts.items() if text}
    return _image_rows({"image": kept}, captions=list(kept.values()))


def _images(files: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Images by their name relative to a folder, without suffix."""
    found: dict[str, Path] = {}
    for file in sorted(files):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
            if name in found:
                raise ValueError(f"'{found[name]}' and '{file}' have the same name, so one text would belong to both.")
            found[name] = file
    return found


def _text(*images: Path) -> list[str] | None:
    """The captions in the `.txt` file next to one of these images, one per line; None if there are none."""
    files = (image.with_suffix(".txt") for image in images)
    text = next((utf8_text(file.read_bytes(), f"'{file}'") for file in files if file.exists()), "")
    return [line.strip() for line in text.splitlines() if line.strip()] or None


def _image_rows(images: dict[str, Iterable[Path]], **columns: list) -> Dataset:
    cells = {name: [{"bytes": None, "path": str(path)} for path in paths] for name, paths in images.items()}
    rows = Dataset.from_dict({**cells, **columns})
    return rows.cast(Features({**rows.features, **dict.fromkeys(images, Image())}))


def annotations(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file with a list of images, as from COCO or Karpathy; None for JSON with rows."""
    if path.suffix.lower() != ".json":
        return None
    with open(path, encoding="utf-8-sig") as file:
        first = file.readline()
        if not first.lstrip().startswith("{"):
            return None
        try:
            content = json.loads(first + file.read())
        except json.JSONDecodeError:  # one object per line
            return None
    images = content.get("images")
    return content if isinstance(images, list) and images and isinstance(images[0], dict) else None


def has_captions(content: dict[str, Any]) -> bool:
    return "sentences" in content["images"][0] or "caption" in (content.get("annotations") or [{}])[0]


def annotated_images(content: dict[str, Any], path: Path) -> dict[str, Callable[[bool], Dataset]]:
    """
    Functions that return the images of each split in COCO's annotations or Karpathy's file, with ids and lists of
    captions. Only the images of a split that is read need to exist. With False, they return the images' names.
    """
    images = content["images"]
    if not has_captions(content):
        raise ValueError(f"'{path}' has annotations without captions; the captions of COCO are in captions_*.json.")
    if "sentences" in images[0]:
        rows = [
            (
                "/".join(part for part in (image.get("filepath"), image["filename"]) if part),
                image.get("cocoid", image.get("imgid")),
                texts_of(image["sentences"]),
                next((ours for ours, theirs in KARPATHY_SPLITS.items() if image["split"] in theirs), image["split"]),
            )
            for image in images
        ]
    else:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
        lost = [note for note in content["annotations"] if note["image_id"] not in captions]
        report_unmatched((note["image_id"] for note in lost), "captions of images that are not listed are")
        for note in content["annotations"]:
            captions.get(note["image_id"], []).append(note["caption"])
        report_unmatched(
            (image["file_name"] for image in images if not captions[image["id"]]), "images without a caption are"
        )
        rows = [
            (image["file_name"], image["id"], captions[image["id"]], "train")
            for image in images
            if captions[image["id"]]
        ]
    splits: dict[str, list] = {}
    for row, (name, image_id, texts, split) in enumerate(rows):
        splits.setdefault(split, []).append((row, name, str(image_id), texts))
    return {split: partial(_annotated_rows, found, path) for split, found in splits.items()}


def _annotated_rows(found: list[tuple[int, str, str, list[str]]], path: Path, images: bool) -> Dataset:
    numbers, names, ids, texts = zip(*found, strict=True)
    if not images:
        return Dataset.from_dict({"image": list(names), "image_id": list(ids), "captions": list(texts)})
    files = [_near(name, path, row) for row, name in zip(numbers, names, strict=True)]
    return _image_rows({"image": files}, image_id=list(ids), captions=list(texts))


def _near(name: str, path: Path, row: int) -> Path:
    """
    Find an image of an annotations file: next to the file, in the working directory, or in COCO's image folders.

    Raises:
        FileNotFoundError: the image is in none of them.
        ValueError: the image is in several of them.
    """
    parent = path.resolve().parent
    for folder in (parent, Path.cwd()):
        if (folder / name).exists():
            return folder / name
    bases = [base for top in (parent, parent.parent) for base in (top, top / "images") if base.is_dir()]
    folders = dict.fromkeys([parent.parent, *(folder for base in bases for folder in subfolders(base))])
    found = [folder for folder in folders if (folder / name).exists()]
    if len(found) > 1:  # captions_val2017.json belongs to val2017
        found = [folder for folder in found if folder.name in path.stem] or found
    if not found:
        raise FileNotFoundError(f"Row {row} of '{path}' names '{name}', which exists in no folder next to that file.")
    if len(found) > 1:
        raise ValueError(
            f"Row {row} of '{path}' names '{name}', which exists in several folders: {list(map(str, found))}."
        )
    return found[0] / name
