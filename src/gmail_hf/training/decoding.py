"""Opening images as RGB: the same for training, evaluation and serving, and safe for untrusted files."""

import hashlib
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from datasets.utils.file_utils import xopen
from PIL import Image as PILImage
from PIL import ImageOps

# Raster formats that Pillow decodes itself. Other formats can start programs (EPS) or fetch files.
_KNOWN = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "HEIF")
PILImage.init()
FORMATS = tuple(kind for kind in _KNOWN if kind in PILImage.OPEN)
IMAGE_SUFFIXES = {suffix for suffix, kind in PILImage.registered_extensions().items() if kind in FORMATS}
# Processors resize the shorter edge: they would resize 6000 x 1 pixels to 1.3 million x 224.
MAX_ASPECT_RATIO = 50
PNG_SIGNATURE, PNG_PIXELS = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")


class BadImageError(ValueError):
    """An image that cannot be read."""


def decode_image(image: Any) -> PILImage.Image:
    """
    Decode an image to RGB, as training and evaluation do.

    Transparent parts become white, as in the image processors of transformers. 16-bit grayscale is scaled to 8 bits.
    The orientation in the EXIF data is applied. Unreadable metadata is ignored.

    Args:
        image: a path or URL that datasets reads (`hf://`, `zip://`, `https://`), the bytes of a file, a `PIL.Image`, a
            uint8 array of shape `(height, width)`, `(height, width, 3)` or `(height, width, 4)`, or a cell
            `{"bytes", "path"}` of `datasets.Image(decode=False)`.

    Raises:
        BadImageError: the image is missing, truncated, in a format that is not in `FORMATS`, or holds 32-bit integers
            or floats; it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or one edge is more than
            `MAX_ASPECT_RATIO` times the other.
    """
    cell = image if isinstance(image, dict) else {}
    if isinstance(image, (str, os.PathLike)):
        cell = {"path": os.fspath(image)}
    elif isinstance(image, (bytes, bytearray, memoryview)):
        cell = {"bytes": bytes(image)}
    try:
        if isinstance(image, np.ndarray):
            return _decoded(PILImage.fromarray(image))
        if isinstance(image, PILImage.Image):
            return _decoded(image)
        if cell.get("bytes") is None and cell.get("path") is None:
            if isinstance(image, dict) or image is None:
                raise BadImageError("no image in this cell")
            raise BadImageError(f"{type(image).__name__} is not an image; pass a path, bytes, a PIL.Image or an array")
        content = image_content(cell)
        try:
            with PILImage.open(io.BytesIO(content), formats=FORMATS) as opened:
                return _decoded(opened)
        except Exception:
            pixels = _png_without_metadata(content)
            if pixels is None:
                raise
            with PILImage.open(io.BytesIO(pixels), formats=FORMATS) as opened:
                return _decoded(opened)
    except BadImageError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files, even SyntaxError
        name = getattr(image, "filename", None) or cell.get("path") or "image"
        raise BadImageError(f"{name} cannot be read ({error})") from error


def image_content(cell: dict[str, Any]) -> bytes:
    """
    The bytes of the image file in a cell `{"bytes", "path"}`.

    Raises:
        OSError: the path is not a regular file (a pipe would block the reader), or cannot be read.
    """
    if cell.get("bytes") is not None:
        return cell["bytes"]
    path = cell["path"]
    if "://" in path:
        with xopen(path, "rb") as file:
            return file.read()
    if Path(path).exists() and not Path(path).is_file():
        raise OSError("it is not a file")
    return Path(path).read_bytes()


def digest_of(cell: Any) -> str:
    """Return a hash of an image file, or an empty text if the file cannot be read."""
    try:
        content = image_content(cell)
    except Exception:  # no file, an empty cell, which may be None, or one of many errors of archives and addresses
        return ""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def within_bounds(width: int, height: int) -> bool:
    """Whether an image size is positive, not too large and without an extreme aspect ratio."""
    shorter, longer = sorted((width, height))
    limit = PILImage.MAX_IMAGE_PIXELS or float("inf")
    return 0 < longer <= MAX_ASPECT_RATIO * shorter and width * height <= limit


def _decoded(image: PILImage.Image) -> PILImage.Image:
    if image.format not in (None, *FORMATS):
        raise ValueError(f"the format {image.format} is not one of {', '.join(FORMATS)}")
    if not within_bounds(*image.size):
        raise ValueError(
            f"its size is {image.width} x {image.height}; the limits are {PILImage.MAX_IMAGE_PIXELS} pixels and an "
            f"aspect ratio of {MAX_ASPECT_RATIO}"
        )
    image.load()  # reads the file
    file_format = image.format
    try:
        image = ImageOps.exif_transpose(image)  # as in datasets
    except Exception:  # only the metadata is damaged
        pass
    return _to_rgb(image, file_format)


def _to_rgb(image: PILImage.Image, file_format: str | None) -> PILImage.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):  # PNG has at most 16 bits
        image = PILImage.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has no fixed range of values; convert it to 8 bits")
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _png_without_metadata(content: bytes) -> bytes | None:
    """A PNG without text, profiles and the like, which Pillow may refuse to read; None for other files."""
    if not content.startswith(PNG_SIGNATURE):
        return None
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        end = position + 12 + length  # with the checksum
        if kind in PNG_PIXELS:
            kept.append(content[position:end])
        position = end
    return b"".join(kept)
