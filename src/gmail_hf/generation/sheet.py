"""A contact sheet of real images, each with up to five generated images of its captions (Figures 2, 4-9)."""

import os
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from ..files import replacing
from ..metrics import plot_pairs
from ..training.data import BadImageError, decode_image

SHEET_ROWS, SHEET_COLUMNS = 8, 5


def write_contact_sheet(shard: str | os.PathLike, path: str | os.PathLike) -> None:
    """
    Draw the first images of a shard as PNG: one line per image id, see [`metrics.plot_pairs`].

    Args:
        shard: a parquet shard.
        path: PNG file to write.
    """
    file = pq.ParquetFile(shard)
    groups: dict[str, list[dict]] = {}
    for batch in file.iter_batches(batch_size=100):
        for row in batch.to_pylist():
            groups.setdefault(row["image_id"], []).append(row)
        if len(groups) > SHEET_ROWS:
            break
    lines = list(groups.values())[:SHEET_ROWS]
    if not lines:
        return
    real = [_picture(line[0]["real_image"]) for line in lines] if "real_image" in lines[0][0] else None
    generated = [[_picture(row["generated_image"]) for row in line[:SHEET_COLUMNS]] for line in lines]
    with replacing(path) as partial:
        plot_pairs(partial, real, generated, [line[0]["caption"] for line in lines], columns=1)


def _picture(cell: Any) -> Image.Image:
    try:
        return decode_image(cell)
    except BadImageError:
        blank = Image.new("RGB", (256, 256), "white")
        ImageDraw.Draw(blank).text((80, 120), "cannot be read", "black")
        return blank
