"""A contact sheet of real images, each with up to five generated images of its captions (Figures 2, 4-9)."""

import os
import textwrap

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from ..files import replacing
from ..training.data import BadImageError, decode_image

SHEET_ROWS, SHEET_COLUMNS, SIDE, MARGIN, TEXT_HEIGHT = 8, 5, 160, 8, 20
REAL_COLOR, GENERATED_COLOR, INK = "#2a6fbb", "#d9662b", "#202020"


def write_contact_sheet(shard: str | os.PathLike, path: str | os.PathLike) -> None:
    """
    Draw the first images of a shard as PNG: one line per image id, with a blue frame around the real image and orange
    frames around generated ones.

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
    has_real = "real_image" in lines[0][0]
    columns = has_real + min(SHEET_COLUMNS, max(len(line) for line in lines))
    width = max(columns * (SIDE + MARGIN) + MARGIN, 3 * SIDE)
    height = len(lines) * (SIDE + TEXT_HEIGHT + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, line in enumerate(lines):
        top = MARGIN + number * (SIDE + TEXT_HEIGHT + MARGIN)
        cells = [(row["generated_image"], GENERATED_COLOR) for row in line[:SHEET_COLUMNS]]
        if has_real:
            cells.insert(0, (line[0]["real_image"], REAL_COLOR))
        for column, (cell, color) in enumerate(cells):
            left = MARGIN + column * (SIDE + MARGIN)
            try:
                sheet.paste(_fit(decode_image(cell)), (left, top))
            except BadImageError:
                draw.text((left + MARGIN, top + SIDE // 2), "cannot be read", INK, font)
            draw.rectangle((left, top, left + SIDE, top + SIDE), outline=color, width=3)
        text = textwrap.shorten(line[0]["caption"], width // 7, placeholder=" …")
        draw.text((MARGIN, top + SIDE + 3), text, INK, font)
    with replacing(path) as partial:
        sheet.save(partial, "PNG")


def _fit(image: Image.Image) -> Image.Image:
    """Resize an image to a square of `SIDE` pixels. Small images are shown pixelated."""
    resample = Image.Resampling.NEAREST if max(image.size) < SIDE else Image.Resampling.BICUBIC
    return image.resize((SIDE, SIDE), resample)
