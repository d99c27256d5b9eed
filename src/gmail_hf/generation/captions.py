"""Captions from any source, one row each, with stable ids."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Image
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils import logging

from ..publishing.provenance import local_path
from ..training.columns import find_column, paths_of, text_ids, texts_of
from ..training.data import undecoded
from ..training.decoding import BadImageError, decode_image, image_content
from ..training.sources import load_rows, resolve_images
from .arguments import SynthesisArguments

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
        if args.real_images != "drop":
            dataset = resolve_images(dataset, Path(args.dataset))
        dataset = undecoded(dataset)
        columns = dataset.column_names
        id_column = find_column(dataset, "image_id", args.image_id_column)
        image_column = find_column(dataset, "real_image", args.real_image_column)
        caption_column = find_column(dataset, "caption", args.caption_column)
        if caption_column is None:
            raise ValueError(f"There is no column 'caption' but {columns}: name yours by `caption_column`.")
        self.real_images = args.real_images or ("keep" if image_column else "drop")
        if self.real_images != "drop" and image_column is None:
            raise ValueError(
                f"`real_images='{self.real_images}'` needs a column of images; there are {columns}: name it by "
                "`real_image_column`."
            )
        if image_column and self.real_images != "drop" and not isinstance(dataset.features[image_column], Image):
            raise ValueError(
                f"Column '{image_column}' is {dataset.features[image_column]}, neither images nor their paths."
            )
        ids = text_ids(dataset, id_column, args.dataset) if id_column else map(str, range(len(dataset)))
        count: Counter = Counter()
        rows, captions, image_ids, caption_ids, empty = [], [], [], [], 0
        for row, (image_id, cell) in enumerate(zip(ids, dataset[caption_column][:], strict=True)):
            for caption in texts_of(cell):
                if caption is not None and not isinstance(caption, str):
                    raise ValueError(f"Column '{caption_column}' holds {type(caption).__name__}, not text.")
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
            raise ValueError(f"'{args.dataset}' holds no caption in column '{caption_column}'.")
        keep = slice(args.num_captions)
        self.rows = np.array(rows[keep])
        self.captions, self.image_ids, self.caption_ids = captions[keep], image_ids[keep], caption_ids[keep]
        self.image_column = image_column
        self.images = None if self.real_images == "drop" else dataset[image_column]
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
        """The cell of the real image of caption `index`: `{"bytes", "path"}`; None if it is no image."""
        cell = self.images[int(self.rows[index])]
        if cell is None:
            return None
        if self.real_images == "reference":
            return {"bytes": None, "path": cell["path"] if "://" in cell["path"] else os.path.abspath(cell["path"])}
        try:
            decode_image(cell)  # other files do not get into shards, which are pushed
            cell = {"bytes": image_content(cell), "path": cell["path"]}
        except (BadImageError, OSError) as error:
            logger.warning(
                f"The real image of caption {self.caption_ids[index]} cannot be read and is left out: {error}."
            )
            return None
        return {"bytes": cell["bytes"], "path": os.path.basename((cell["path"] or "").partition("::")[0]) or None}


def _check_inside(rows: Dataset, column: str, name: str) -> None:
    """
    Refuse images outside the data set's own folder: whoever wrote the data set could name any file of this machine.

    Raises:
        ValueError: the message names the first one.
    """
    path = local_path(name, "data set")
    if path is None:  # of the Hub: files that datasets has downloaded
        folders = [Path(folder) for folder in (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)]
    elif path.is_dir():
        folders = [path]
    else:  # COCO's annotations are in a folder next to the images
        folders = [path.parent.parent if path.resolve().parent.name == "annotations" else path.parent]
    folders = [folder.resolve() for folder in folders]
    for row, image in enumerate(paths_of(rows, column)):
        file = (image or "").rpartition("::")[2]
        if file and ("://" in file or not any(Path(file).resolve().is_relative_to(folder) for folder in folders)):
            raise ValueError(
                f"Row {row} of '{name}' names the image '{image}', which is not below '{folders[0]}'. Images "
                "are copied into the shards: if you trust the data set, add --allow_paths_outside."
            )


def load_captions(args: SynthesisArguments) -> Captions:
    """
    The captions of `args.dataset`.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: see [`load_rows`] and [`Captions`].
    """
    rows = load_rows(
        args.dataset,
        args.split,
        args.dataset_config,
        args.dataset_revision,
        any_split=Path(args.dataset).is_file(),  # which has none
        images=args.real_images != "drop",
    )
    captions = Captions(rows, args)
    if captions.real_images == "keep" and not args.allow_paths_outside:
        _check_inside(rows, captions.image_column, args.dataset)
    return captions
