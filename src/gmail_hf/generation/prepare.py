"""Pairs whose images need no decoding: raw pixels at the size the model takes, in memory-mapped Arrow files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..files import new_folder
from ..training.checks import check_pairs
from ..training.data import BadImageError, decode_image, image_processor_of, undecoded
from ..training.loading import check_free_disk

IMAGE_COLUMNS = ("real_image", "generated_image")


def prepare_pairs(
    pairs: Dataset, processor: Any, output_dir: str | os.PathLike, num_proc: int | None = None
) -> Dataset:
    """
    Decode, resize and crop the images once, as the processor would do at every step.

    The result is a data set of pairs like any other, for [`load_pairs`], [`GmailTrainer`] and other readers of images.
    Each cell holds the uint8 pixels behind a header of a few bytes (the PPM format): to decode it is to copy memory.
    The processor finds nothing to resize or crop and gives the same tensors as for the original.

    Args:
        pairs (`datasets.Dataset`): see [`check_pairs`].
        processor: a `CLIPProcessor` or an image processor.
        output_dir: the folder to write, about `2 * 3 * height * width` bytes per pair; writing it takes twice as much.
        num_proc (`int`, *optional*): processes that decode.

    Returns:
        The prepared pairs, memory-mapped. An image that cannot be read stays as it is, or becomes empty if its file is
        missing, for the trainer to skip.

    Raises:
        FileExistsError: `output_dir` exists, or another process is making it.
        OSError: the disk has too little room.
        ValueError: a data set that [`check_pairs`] refuses; a processor that gives images of unequal sizes.
    """
    check_pairs(pairs, "pairs")
    if Path(output_dir).exists():
        raise FileExistsError(f"'{output_dir}' exists already: choose another --output_dir.")
    image_processor = image_processor_of(processor)
    features, pairs = pairs.features, undecoded(pairs)
    sizes = {
        _resized(image_processor, decode_image(row["generated_image"])).nbytes
        for row in pairs.select(range(min(4, len(pairs))))
    }
    if len(sizes) != 1:
        raise ValueError("The processor gives images of unequal sizes: let it crop, or resize to a fixed size.")
    # Twice: what `map` writes is saved once more.
    check_free_disk(output_dir, 2 * (len(pairs) + 1) * len(IMAGE_COLUMNS) * sizes.pop())

    def prepare(batch: dict[str, list]) -> dict[str, list]:
        return {column: [_prepared(image_processor, cell) for cell in batch[column]] for column in IMAGE_COLUMNS}

    # By default `map` writes into the source's folder, among the user's own results.
    with new_folder(output_dir) as folder:
        pairs.map(
            prepare,
            batched=True,
            batch_size=64,
            features=features,
            cache_file_name=str(folder.parent / "pairs.arrow"),
            num_proc=num_proc,
            desc="Preparing images",
        ).save_to_disk(folder)
    return Dataset.load_from_disk(output_dir)


def _resized(image_processor: Any, image: Any) -> np.ndarray:
    """uint8 `(height, width, 3)`: the processor's geometry without its arithmetic."""
    inputs = image_processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    return np.ascontiguousarray(inputs["pixel_values"][0].astype(np.uint8).transpose(1, 2, 0))


def _prepared(image_processor: Any, cell: dict | None) -> dict | None:
    try:
        pixels = _resized(image_processor, decode_image(cell))
    except BadImageError:
        missing = cell and cell["bytes"] is None and not os.path.exists(cell["path"])
        return {"bytes": b"", "path": cell["path"]} if missing else cell  # what has no bytes, `save_to_disk` reads
    height, width, _ = pixels.shape
    return {"bytes": f"P6 {width} {height} 255\n".encode() + pixels.tobytes(), "path": None}
