"""Captions from any source, one per row, with stable ids."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Image
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils import logging

from ..publishing.provenance import local_path, on_hub
from ..training.columns import class_names, find_column, paths_of, text_ids, texts_of, with_ids
from ..training.data import undecoded
from ..training.decoding import BadImageError, decode_image, image_content
from ..training.sources import load_rows, matching_files, resolve_images
from .arguments import SynthesisArguments

logger = logging.get_logger(__name__)


class Captions:
    """
    The captions of a data set, one per row, with the image's id and the caption's id.

    An image may have several captions, as a list in one row or in several rows. The id of its k-th caption is
    `<image_id>-<k>`, so ids of captions do not change when images are added to the data set.

    Args:
        dataset (`datasets.Dataset`): rows with a caption or a list of captions.
        args ([`SynthesisArguments`]): column names, number of captions, and use of the real images.

    Raises:
        ValueError: a column is missing or has the wrong type, there are no captions, or real images cannot be
            referenced.
    """

    def __init__(self, dataset: Dataset, args: SynthesisArguments):
        if args.real_images != "drop":
            dataset = resolve_images(dataset, Path(args.dataset))
        dataset = undecoded(dataset)
        columns = dataset.column_names
        id_column = find_column(dataset, "image_id", args.image_id_column)
        image_column = find_column(dataset, "real_image", args.real_image_column)
        caption_column = find_column(dataset, "caption", args.caption_column)
        if caption_column is None:
            raise ValueError(f"There is no column 'caption', only {columns}: set `caption_column`.")
        self.real_images = args.real_images or ("keep" if image_column else "drop")
        if self.real_images != "drop" and image_column is None:
            raise ValueError(
                f"`real_images='{self.real_images}'` needs a column of images, but the columns are {columns}: set "
                "`real_image_column`."
            )
        if image_column and self.real_images != "drop" and not isinstance(dataset.features[image_column], Image):
            raise ValueError(
                f"Column '{image_column}' must have images or their paths, got {dataset.features[image_column]}."
            )
        if id_column:
            ids = text_ids(dataset, id_column, args.dataset)
        elif image_column:
            images = dataset.select_columns(image_column).rename_column(image_column, "real_image")
            ids = with_ids(images, args.dataset)["image_id"][:]
        else:
            ids = map(str, range(len(dataset)))
        cells = dataset[caption_column][:]
        if isinstance(label := dataset.features[caption_column], ClassLabel):  # classes are captions by their names
            cells = class_names(label, cells)
        count: Counter = Counter()
        rows, captions, image_ids, caption_ids, empty = [], [], [], [], 0
        for row, (image_id, cell) in enumerate(zip(ids, cells, strict=True)):
            for caption in texts_of(cell):
                if caption is not None and not isinstance(caption, str):
                    raise ValueError(f"Column '{caption_column}' must have text, got {type(caption).__name__}.")
                name = f"{image_id}-{count[image_id]}"
                count[image_id] += 1
                if not caption or not caption.strip():
                    empty += 1
                    continue
                rows.append(row)
                captions.append(caption)
                image_ids.append(image_id)
                caption_ids.append(name)
            if args.num_captions is not None and len(rows) >= args.num_captions:
                break
        if empty:
            logger.warning(f"{empty} empty captions are left out.")
        if not captions:
            raise ValueError(f"'{args.dataset}' has no captions in column '{caption_column}'.")
        keep = slice(args.num_captions)
        self.rows = np.array(rows[keep])
        self.captions, self.image_ids, self.caption_ids = captions[keep], image_ids[keep], caption_ids[keep]
        self.dataset, self.image_column = dataset, image_column
        self.images = None if self.real_images == "drop" else dataset[image_column]
        if self.real_images == "reference":
            first = next((cell for row in self.rows if (cell := self.images[int(row)])), None)
            if first is not None and first["path"] is None:
                raise ValueError(
                    f"Column '{image_column}' has bytes without paths, so images cannot be referenced: keep or drop "
                    "them."
                )

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        """Hash all captions and their ids."""
        digest = hashlib.blake2b(digest_size=16)
        for caption_id, caption in zip(self.caption_ids, self.captions, strict=True):
            digest.update(f"{caption_id}\0{caption}\0".encode())
        return digest.hexdigest()

    def real_image(self, index: int) -> dict | None:
        """Return the real image of caption `index` as `{"bytes", "path"}`, or None if it is not an image."""
        cell = self.images[int(self.rows[index])]
        if cell is None:
            return None
        if self.real_images == "reference":
            return {"bytes": None, "path": cell["path"] if "://" in cell["path"] else os.path.abspath(cell["path"])}
        try:
            decode_image(cell)  # shards are pushed, so they must not contain other files
            cell = {"bytes": image_content(cell), "path": cell["path"]}
        except (BadImageError, OSError) as error:
            logger.warning(
                f"The real image of caption {self.caption_ids[index]} cannot be read and is left out: {error}."
            )
            return None
        return {"bytes": cell["bytes"], "path": os.path.basename((cell["path"] or "").partition("::")[0]) or None}


def _check_inside(rows: Dataset, column: str, name: str) -> None:
    """
    Refuse images outside the data set's own folder, because a data set could refer to any file on this machine.

    Raises:
        ValueError: an image is outside the folder. The message gives the first one.
    """
    files = matching_files(name)
    if files is None and (path := local_path(name, "data set")):
        files = [path]
    if files is None:  # a Hub data set: files downloaded by datasets
        folders = [Path(folder) for folder in (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)]
    else:
        folders = [file if file.is_dir() else _folder_of_images(file) for file in files]
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    for row, image in enumerate(paths_of(rows, column)):
        file = (image or "").rpartition("::")[2]
        if file and ("://" in file or not any(Path(file).resolve().is_relative_to(folder) for folder in folders)):
            outside = " and ".join(f"'{folder}'" for folder in folders)
            raise ValueError(
                f"Row {row} of '{name}' refers to the image '{image}', which is outside {outside}. Images are copied "
                "into the shards: if you trust the data set, add --allow_paths_outside."
            )


def _folder_of_images(file: Path) -> Path:
    """The folder that may hold the images of a file: COCO's annotations are in a folder next to the images."""
    return file.parent.parent if file.resolve().parent.name == "annotations" else file.parent


def load_captions(args: SynthesisArguments) -> Captions:
    """
    Load the captions of `args.dataset`.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: see [`load_rows`] and [`Captions`]. If a real image does not
            exist, the message names `--real_images drop`, unless `args.real_images` is given.
    """
    try:
        rows = load_rows(
            args.dataset,
            args.split,
            args.dataset_config,
            args.dataset_revision,
            any_split=Path(args.dataset).is_file(),  # a file has no splits
            images=args.real_images != "drop",
        )
        captions = Captions(rows, args)
    except FileNotFoundError as error:
        if args.real_images is not None or not (Path(args.dataset).exists() or on_hub(args.dataset)):
            raise
        raise FileNotFoundError(f"{error} To generate without real images, add --real_images drop.") from error
    if captions.real_images == "keep" and not args.allow_paths_outside:
        _check_inside(captions.dataset, captions.image_column, args.dataset)
    return captions
