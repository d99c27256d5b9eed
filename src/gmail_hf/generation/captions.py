"""Captions from any source, one row each, with stable ids."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Image, Value
from transformers.utils import logging

from ..training.data import undecoded
from ..training.loading import load_pairs
from .arguments import SynthesisArguments

FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv"}

logger = logging.get_logger(__name__)


class Captions:
    """
    The captions of a data set, flattened: row i is a caption, its image's id, and its own id.

    An image with several captions, whether as a list in one row or in several rows, gives a caption each; the id of
    its k-th is `<image_id>-<k>`, so adding images to a data set renames no caption.

    Args:
        dataset (`datasets.Dataset`): rows with a caption, or a list of captions, each.
        args ([`SynthesisArguments`]): names of the columns, how many captions, what happens to the real images.

    Raises:
        ValueError: a column that is not there or of another type; no captions; real images that cannot be referenced.
    """

    def __init__(self, dataset: Dataset, args: SynthesisArguments):
        dataset = undecoded(dataset)
        columns = dataset.column_names
        id_column = _column(columns, args.image_id_column, ("image_id",), "image_id_column")
        image_column = _column(columns, args.real_image_column, ("real_image", "image"), "real_image_column")
        _column(columns, args.caption_column, (), "caption_column")
        self.real_images = args.real_images or ("keep" if image_column else "drop")
        if self.real_images != "drop" and image_column is None:
            raise ValueError(
                f"`real_images='{self.real_images}'` needs a column of images; there are {columns}: name it by "
                "`real_image_column`."
            )
        ids = dataset[id_column][:] if id_column else range(len(dataset))
        count: Counter = Counter()
        rows, captions, image_ids, caption_ids, empty = [], [], [], [], 0
        for row, (image_id, cell) in enumerate(zip(ids, dataset[args.caption_column][:], strict=True)):
            for caption in cell if isinstance(cell, list) else [cell]:
                if caption is not None and not isinstance(caption, str):
                    raise ValueError(f"Column '{args.caption_column}' holds {type(caption).__name__}, not text.")
                name = f"{image_id}-{count[image_id]}"
                count[image_id] += 1
                if not caption or not caption.strip():
                    empty += 1
                    continue
                rows.append(row)
                captions.append(caption)
                image_ids.append(str(image_id))
                caption_ids.append(name)
            if args.num_captions is not None and len(rows) >= args.num_captions:
                break
        if empty:
            logger.warning(f"{empty} empty captions are left out.")
        if not captions:
            raise ValueError(f"'{args.dataset}' holds no caption in column '{args.caption_column}'.")
        keep = slice(args.num_captions)
        self.rows = np.array(rows[keep])
        self.captions, self.image_ids, self.caption_ids = captions[keep], image_ids[keep], caption_ids[keep]
        self.images = None if self.real_images == "drop" else _image_column(dataset, image_column)
        if self.real_images == "reference" and self.images[int(self.rows[0])]["path"] is None:
            raise ValueError(f"Column '{image_column}' holds bytes without a path: they can be kept, not referenced.")

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        """A hash of all captions and their ids."""
        digest = hashlib.blake2b(digest_size=16)
        for caption_id, caption in zip(self.caption_ids, self.captions, strict=True):
            digest.update(f"{caption_id}\0{caption}\0".encode())
        return digest.hexdigest()

    def real_image(self, index: int) -> dict | None:
        """The cell of the real image of caption `index`: `{"bytes", "path"}`; None if its file cannot be read."""
        cell = self.images[int(self.rows[index])]
        if cell is None:
            return None
        if self.real_images == "reference":
            return {"bytes": None, "path": os.path.abspath(cell["path"])}
        if cell["bytes"] is None:
            try:
                cell = {"bytes": Path(cell["path"]).read_bytes(), "path": cell["path"]}
            except OSError as error:
                logger.warning(f"The real image of caption {self.caption_ids[index]} cannot be read: {error}.")
                return None
        return {"bytes": cell["bytes"], "path": os.path.basename(cell["path"]) if cell["path"] else None}


def load_captions(args: SynthesisArguments) -> Captions:
    """
    The captions of `args.dataset`.

    Raises:
        FileNotFoundError, ValueError: see [`load_pairs`] and [`Captions`].
    """
    name = args.dataset
    if Path(name).suffix in FILE_BUILDERS:
        if not Path(name).exists():
            raise FileNotFoundError(f"No captions at '{name}'.")
        dataset = datasets.load_dataset(FILE_BUILDERS[Path(name).suffix], data_files=name, split="train")
    else:
        dataset = load_pairs(name, args.split, args.dataset_config, args.dataset_revision)
    return Captions(dataset, args)


def _column(columns: list[str], asked: str | None, usual: tuple[str, ...], option: str) -> str | None:
    if asked is not None and asked not in columns:
        raise ValueError(f"There is no column '{asked}' but {columns}: see `{option}`.")
    return asked or next((column for column in usual if column in columns), None)


def _image_column(dataset: Dataset, column: str) -> datasets.arrow_dataset.Column:
    feature = dataset.features[column]
    if feature == Value("string"):  # paths, as in a json or csv file
        dataset = dataset.cast_column(column, Image(decode=False))
    elif not isinstance(feature, Image):
        raise ValueError(f"Column '{column}' is {feature}, neither images nor their paths.")
    return dataset[column]
