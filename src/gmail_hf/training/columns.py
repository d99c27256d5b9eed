"""Columns of pairs: usual names, ids as text, one caption per row, and pairs from rows of single images."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value, concatenate_datasets
from transformers.utils import logging

# Usual names of columns and folders by role, without words such as "image" and "path", see `words_of`.
USUAL = {
    "caption": {"caption", "captions", "text", "texts", "txt", "sentence", "sentences", "prompt", "prompts"},
    "real_image": {"image", "real", "photo", "photos", "photograph", "photographs", "original"},
    "generated_image": {"generated", "gen", "synthetic", "synth", "fake"},
    "image_id": {"image_id", "imgid", "cocoid"},
}
IMAGE_NAMES = USUAL["real_image"] | USUAL["generated_image"]
FILLERS = {"image", "images", "img", "path", "file", "filename", "filepath", "name", "jpg", "jpeg", "png", "webp"}
REAL_WORDS = {"real", "photo", "photograph", "original", "natural"}
LABELS = {"label", "labels", "class", "classes", "cls", "category", "class_name", "fine_label"}
REAL_FLAGS = ("is_real", "real")
# Columns where 1 means a generated image; Defactify has label_a.
GENERATED_FLAGS = ("is_generated", "generated", "is_fake", "fake", "is_synthetic", "synthetic", "is_ai", "label_a")

SHOWN = 5  # names listed in a warning

logger = logging.get_logger(__name__)


def find_column(dataset: Dataset, role: str, asked: str | None = None) -> str | None:
    """
    Find the column with the captions, the images or their ids.

    Args:
        dataset: rows from [`load_rows`].
        role: one of [`data.PAIR_COLUMNS`].
        asked: the name that the user gave. The name of the role counts as not given.

    Returns:
        `asked`, or `role`, or the only column with another usual name, which is logged; None if there is none.

    Raises:
        ValueError: `asked` does not exist, or several columns have usual names.
    """
    columns = dataset.column_names
    if asked not in (None, role):
        if asked not in columns:
            raise ValueError(f"There is no column '{asked}' among {columns}: check `{role}_column`.")
        return asked
    if role in columns:
        return role
    images = [column for column in columns if isinstance(dataset.features[column], Image)]
    fitting = images if role.endswith("_image") else [column for column in columns if column not in images]
    found = [column for column in fitting if words_of(column) in USUAL[role]]
    if len(found) > 1:
        raise ValueError(f"Several columns can be '{role}': {found}. Choose one with --{role}_column.")
    if not found:
        return None
    logger.warning(f"Using column '{found[0]}' as '{role}'.")
    return found[0]


def texts_of(cell: Any) -> list[str]:
    """The captions in a cell, which is a text, or a list of texts or of Karpathy's sentences."""
    if isinstance(cell, dict):
        cell = cell.get("raw", cell.get("caption"))
    return [text for part in cell for text in texts_of(part)] if isinstance(cell, list) else [cell]


def class_names(label: ClassLabel, cells: Iterable[int | None]) -> list[str | None]:
    """The names of classes, None for empty cells."""
    return [None if cell is None else label.int2str(cell) for cell in cells]


def is_missing(image_id: Any) -> bool:
    """Whether an id is None, empty or NaN."""
    return image_id is None or image_id == "" or image_id != image_id


def report_unmatched(names: Iterable[Any], what: str) -> None:
    """Warn about what is left out: the number and the first names."""
    names = list(names)
    if names:
        shown = ", ".join(str(name) for name in names[:SHOWN])
        logger.warning(f"{len(names)} {what} left out: {shown}{', ...' if len(names) > SHOWN else ''}.")


def words_of(column: str) -> str:
    """
    A column's name without case and filler words: `caption` for `Caption`, `real` for `real_image_path` and
    `real.jpg`, `image` for `image` and `file_name`.
    """
    words = "".join(letter if letter.isalnum() else " " for letter in column.lower()).split()
    if words[-1:] == ["id"]:
        return "_".join(words)
    return "_".join(word for word in words if word not in FILLERS) or "image"


def text_ids(dataset: Dataset, column: str, name: str) -> list[str]:
    """
    The ids in a column, as text.

    Raises:
        ValueError: a row has no id; the ids are neither text nor integers (JSON turns large integers into floats), or
            mix numbers and text.
    """
    values = dataset[column][:]
    for row, value in enumerate(values):
        if is_missing(value):
            raise ValueError(f"Row {row} of '{name}' has no '{column}'. Fill in the cell, or remove the column.")
    if type(dataset.features[column]).__name__ == "Json":  # which reads "007" as 7
        raise ValueError(f"Column '{column}' of '{name}' mixes numbers and text. Put all ids in quotes.")
    if not all(isinstance(value, (str, int)) and not isinstance(value, bool) for value in values):
        raise ValueError(
            f"Column '{column}' of '{name}' is {dataset.features[column]}. Write ids as text or integers; other types "
            "may change when they are read."
        )
    return [str(value) for value in values]


def with_ids(dataset: Dataset, name: str) -> Dataset:
    """
    Add or convert the column `image_id`, ids as text.

    Raises:
        ValueError: see [`text_ids`].
    """
    if "image_id" not in dataset.column_names:
        paths = list(paths_of(dataset, "real_image")) if "real_image" in dataset.column_names else []
        files = [path for path in paths if path is not None]
        if files and not any("://" in path for path in files):
            # Predictions contain the ids and may be published, so ids must not contain this machine's paths.
            folder = os.path.commonpath([os.path.dirname(path) for path in files])
            ids = [os.path.relpath(path, folder) if path else str(row) for row, path in enumerate(paths)]
            origin = "the path of the real image" + ", or else the row number," * (len(files) < len(paths))
        else:
            ids, origin = [str(row) for row in range(len(dataset))], "the row number"
        logger.warning(f"'{name}' has no column 'image_id': using {origin} as the id.")
    else:
        ids = text_ids(dataset, "image_id", name)
        if dataset.features["image_id"] == Value("string"):
            return dataset
    return _with_column(dataset, "image_id", ids)


def one_caption_each(dataset: Dataset) -> Dataset:
    """
    Repeat rows with several captions, a list of texts or Karpathy's sentences, once per caption. Class labels become
    the names of the classes.
    """
    cells = dataset["caption"][:]
    feature = dataset.features["caption"]
    if isinstance(feature, ClassLabel):
        return _with_column(dataset, "caption", class_names(feature, cells))
    if not any(isinstance(cell, (list, dict)) for cell in cells):
        return dataset
    texts = [[text for text in texts_of(cell) if text and text.strip()] for cell in cells]
    report_unmatched((row for row, found in enumerate(texts) if not found), "rows without a caption are")
    rows = [row for row, found in enumerate(texts) for _ in found]
    return _with_column(dataset.select(rows), "caption", [text for found in texts for text in found])


def pair_rows(dataset: Dataset, name: str) -> Dataset:
    """
    Pair rows of single images by a column that separates real from generated ones.

    Each generated image is paired with the first real image of the same id. If no ids match, images are paired as in
    [`pair_by_caption`]. Other data sets are returned unchanged.

    Raises:
        ValueError: the column holds numbers and its name does not tell what they mean, or no image has a partner.
    """
    if "generated_image" in dataset.column_names or not {"real_image", "caption"} <= set(dataset.column_names):
        return dataset
    kinds = _kinds(dataset, name)
    if kinds is None:
        return dataset
    if "image_id" not in dataset.column_names:  # the caller did not ask for it
        found_id = find_column(dataset, "image_id")
        dataset = with_ids(dataset.rename_column(found_id, "image_id") if found_id else dataset, name)
    rows = {kind: [row for row, value in enumerate(kinds) if value == kind] for kind in (True, False)}
    ids = [str(key) for key in dataset["image_id"][:]]
    first = {ids[row]: row for row in reversed(rows[False])}
    found = [(first[ids[row]], row) for row in rows[True] if ids[row] in first]
    if not found:
        captions = dataset["caption"][:]
        in_turn = _in_turn([captions[row] for row in rows[True]], [captions[row] for row in rows[False]])
        found = [(rows[False][real], rows[True][generated]) for real, generated in in_turn]
    if not found:
        raise ValueError(f"No generated image of '{name}' has the image_id or the caption of a real one.")
    matched = {row for pair in found for row in pair}
    report_unmatched(
        (row for row in range(len(kinds)) if row not in matched), f"rows of '{name}' without a partner are"
    )
    generated = dataset.select([row for _, row in found]).select_columns(["real_image"])
    generated = generated.rename_column("real_image", "generated_image")
    return concatenate_datasets([dataset.select([row for row, _ in found]), generated], axis=1)


def rows_by_caption(captions: Sequence[Any]) -> dict[Any, np.ndarray]:
    """The row numbers of each caption, in ascending order."""
    rows: dict[Any, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(caption, []).append(row)
    return {caption: np.array(found) for caption, found in rows.items()}


def _in_turn(generated: Sequence[Any], real: Sequence[Any]) -> list[tuple[int, int]]:
    """
    Row numbers `(real, generated)` of pairs with equal captions. Each generated row gets the next real row of its
    caption, starting over after the last one. The remaining real rows get generated rows in the same way.
    """
    of_generated, of_real = rows_by_caption(generated), rows_by_caption(real)
    pairs = []
    used: Counter[Any] = Counter()
    for row, caption in enumerate(generated):
        if caption in of_real:
            partners = of_real[caption]
            pairs.append((int(partners[used[caption] % len(partners)]), row))
            used[caption] += 1
    for caption, count in used.items():
        left = of_real[caption][count:]
        pairs += zip(left.tolist(), np.resize(of_generated[caption], len(left)).tolist(), strict=True)
    return pairs


def pair_by_caption(generated: Dataset, real: Dataset) -> Dataset:
    """
    Join generated and real images that share only a caption or class into one data set of pairs, for
    `pairing="none"`.

    The number of pairs of a caption is the larger of its numbers of generated and real images. The images of the other
    modality are repeated in turn.

    Args:
        generated (`datasets.Dataset`): columns `generated_image` and `caption`.
        real (`datasets.Dataset`): columns `real_image`, `caption` and `image_id`.

    Returns:
        `datasets.Dataset` with the columns of both. Images whose caption occurs in one modality only are left out,
        with a warning.

    Raises:
        ValueError: a column is missing, or the data sets share no caption.
    """
    given = {"generated": (generated, ["generated_image"]), "real": (real, ["real_image", "image_id"])}
    for name, (rows, columns) in given.items():
        if missing := {*columns, "caption"} - set(rows.column_names):
            raise ValueError(f"`{name}` lacks the column(s) {sorted(missing)}; it has {rows.column_names}.")
    captions = [rows["caption"][:] for rows in (generated, real)]
    pairs = _in_turn(*captions)
    if not pairs:
        raise ValueError(
            f"Generated and real images share no caption. The generated ones start with {captions[0][:3]}, the real "
            f"ones with {captions[1][:3]}."
        )
    report_unmatched(sorted(set(captions[0]) ^ set(captions[1])), "captions with images of one modality only are")
    kept = [column for column in real.column_names if column not in generated.column_names]
    parts = [generated.select([row for _, row in pairs]), real.select_columns(kept).select([row for row, _ in pairs])]
    return concatenate_datasets(parts, axis=1)


def _kinds(dataset: Dataset, name: str) -> list[bool] | None:
    """Whether each image is generated, according to the column that says so; None without such a column."""
    for column, feature in dataset.features.items():
        if column in ("caption", "image_id") or not isinstance(feature, (Value, ClassLabel)):
            continue
        title = re.sub(r"\W+", "_", column.lower())
        values = dataset[column][:]
        if isinstance(feature, ClassLabel):
            values = class_names(feature, values)
        known = {str(value).strip().lower() for value in values}
        absent = next((row for row, value in enumerate(values) if value in (None, "")), None)
        if absent is not None and (known & REAL_WORDS or title in (*REAL_FLAGS, *GENERATED_FLAGS)):
            raise ValueError(f"Row {absent} of '{name}' has no '{column}', which marks real and generated images.")
        if len(known) > 1 and known & REAL_WORDS:
            logger.warning(
                f"Column '{column}' of '{name}' separates real images ({sorted(known & REAL_WORDS)}) from "
                f"generated ones ({sorted(known - REAL_WORDS)})."
            )
            return [str(value).strip().lower() not in REAL_WORDS for value in values]
        if known in ({"0", "1"}, {"false", "true"}):
            if title in (*REAL_FLAGS, *GENERATED_FLAGS):
                return [
                    (str(value).strip().lower() in ("1", "true")) == (title in GENERATED_FLAGS) for value in values
                ]
            if title.startswith(("label", "class", "type", "kind", "source")):
                raise ValueError(
                    f"Column '{column}' of '{name}' has the values 0 and 1, which may tell real from generated "
                    "images. Rename it to 'is_generated' or 'is_real', whichever 1 means, or remove it."
                )
    return None


def _with_column(dataset: Dataset, column: str, values: list) -> Dataset:
    others = [name for name in dataset.column_names if name != column]
    values = Dataset.from_dict({column: values})
    return concatenate_datasets([dataset.select_columns(others), values], axis=1) if others else values


def paths_of(dataset: Dataset, column: str) -> Iterator[str | None]:
    """The path of each image, None for an image whose bytes are in the data set; nothing for other columns."""
    if isinstance(dataset.features[column], Image):
        paths = [
            None if held.as_py() else path.as_py()
            for chunk in dataset.data.column(column).chunks
            for path, held in zip(chunk.field("path"), chunk.field("bytes").is_valid(), strict=True)
        ]
        rows = range(len(paths)) if dataset._indices is None else dataset._indices.column(0).to_pylist()
        yield from (paths[row] for row in rows)
