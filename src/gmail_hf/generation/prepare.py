"""Decodes pairs in advance: raw pixels at the model's input size, in memory-mapped Arrow files."""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
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
    Decode, resize and crop the images once instead of at every training step.

    The result is an ordinary data set of pairs for [`load_pairs`], [`GmailTrainer`] and other readers of images. Each
    cell has the uint8 pixels after a header of a few bytes (the PPM format), so decoding only copies memory. The
    processor has nothing to resize or crop and returns the same tensors as for the original images.

    Args:
        pairs (`datasets.Dataset`): see [`check_pairs`].
        processor: a `CLIPProcessor` or an image processor.
        output_dir: new folder of about `2 * 3 * height * width` bytes per pair. Writing it needs twice the space.
        num_proc (`int`, *optional*): number of processes for decoding.

    Returns:
        The prepared pairs, memory-mapped. An unreadable image is kept unchanged, or becomes empty if its file is
        missing. The trainer skips such pairs.

    Raises:
        FileExistsError: `output_dir` exists, or another process is writing it.
        OSError: there is too little disk space.
        ValueError: [`check_pairs`] refuses the pairs, or the processor returns images of different sizes or patches.
    """
    check_pairs(pairs, "pairs")
    if Path(output_dir).exists():
        raise FileExistsError(f"'{output_dir}' already exists: choose another --output_dir.")
    image_processor = image_processor_of(processor)
    features, pairs = pairs.features, undecoded(pairs)
    sizes = {pixels.nbytes for pixels in islice(_readable(image_processor, pairs), 4)}
    if len(sizes) != 1:
        raise ValueError("The processor returns images of different sizes: let it crop, or resize to a fixed size.")
    # Twice, because the output of `map` is then saved again.
    check_free_disk(output_dir, 2 * (len(pairs) + 1) * len(IMAGE_COLUMNS) * sizes.pop())

    def prepare(batch: dict[str, list]) -> dict[str, list]:
        return {column: [_prepared(image_processor, cell) for cell in batch[column]] for column in IMAGE_COLUMNS}

    # By default, `map` writes to the folder of the source data set.
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


def _readable(image_processor: Any, pairs: Dataset) -> Iterator[np.ndarray]:
    """Iterate over the resized generated images, without those that cannot be read."""
    for row in pairs.select_columns(["generated_image"]):
        with suppress(BadImageError):
            yield _resized(image_processor, decode_image(row["generated_image"]))


def _resized(image_processor: Any, image: Any) -> np.ndarray:
    """Resize and crop with the processor, without rescaling and normalisation: uint8 `(height, width, 3)`."""
    inputs = image_processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    pixels = inputs["pixel_values"][0]
    if pixels.ndim != 3:
        raise ValueError(
            "The processor returns patches or tiles of an image instead of (channels, height, width): pairs cannot be "
            "prepared for this model. Train on the data set as it is."
        )
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(1, 2, 0))


def _prepared(image_processor: Any, cell: dict | None) -> dict | None:
    try:
        pixels = _resized(image_processor, decode_image(cell))
    except BadImageError:
        missing = cell and cell["bytes"] is None and not os.path.exists(cell["path"])
        return (
            {"bytes": b"", "path": cell["path"]} if missing else cell
        )  # without bytes, `save_to_disk` opens the path
    height, width, _ = pixels.shape
    return {"bytes": f"P6 {width} {height} 255\n".encode() + pixels.tobytes(), "path": None}
