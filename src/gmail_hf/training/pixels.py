"""What an image processor makes of images, value for value, at a fraction of its time."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

# The header of a prepared image, see `prepare_pairs`: raw pixels follow it.
PREPARED = re.compile(rb"P6 (\d+) (\d+) 255\n")


def raw_pixels(content: bytes | None) -> np.ndarray | None:
    """The pixels of a prepared image, uint8 `(height, width, 3)`, as a view; None for any other file."""
    header = PREPARED.match(content, 0, 32) if content else None
    if header is None:
        return None
    width, height = map(int, header.groups())
    if len(content) != header.end() + 3 * width * height:
        return None
    return np.frombuffer(content, np.uint8, offset=header.end()).reshape(height, width, 3)


def look_up(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """
    The pixel values that 8-bit pixels stand for, on their device.

    Args:
        pixels (`torch.ByteTensor` of shape `(images, 3, height, width)`): see [`PixelValues.eight_bit`].
        table (`torch.FloatTensor` of shape `(3, 256)`): the value of each number in each channel.

    Returns:
        `torch.FloatTensor` of shape `(images, 3, height, width)`.

    Raises:
        ValueError: the table has not one row for each channel.
    """
    if len(table) != pixels.shape[1]:
        raise ValueError(
            f"`pixel_table` has {len(table)} rows for {pixels.shape[1]} channels. `nn.DataParallel` would part it: "
            "start one process for each GPU, by `accelerate launch` or `torchrun`."
        )
    values = torch.empty(pixels.shape, dtype=table.dtype, device=pixels.device)
    if pixels.device.type == "cpu":  # where torch would need each index in 8 bytes
        numbers, found = pixels.numpy(), values.numpy()
        for image, channel in np.ndindex(pixels.shape[:2]):
            np.take(table[channel].numpy(), numbers[image, channel], out=found[image, channel], mode="clip")
    else:
        for channel in range(len(table)):
            found = table[channel].index_select(0, pixels[:, channel].flatten().int())
            values[:, channel] = found.view(values[:, channel].shape)
    return values


class PixelValues:
    """
    `image_processor(images=images, return_tensors="pt")["pixel_values"]`, bit for bit.

    Rescaling and normalising give each of the 256 values of a channel a number of its own: the processor computes
    those once, and they are looked up. Resizing and cropping are done by PIL alone, without the copies between PIL and
    NumPy of the whole image, and left out for images that they do not change. The first image that an object of this
    class is given, and noise of other sizes, are computed both ways; where they differ, the processor serves itself.

    Args:
        image_processor: of transformers.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor
        self.table: torch.Tensor | None = None  # (channels, 256) float32
        self._looks_up: bool | None = None
        self._size: tuple[int, int] | None = None  # width and height of what comes out
        self._by_pil: bool | None = None  # whether PIL alone resizes and crops as the processor does
        self._keeps_it: bool | None = None  # whether images of that size are left as they are

    def __call__(self, images: Sequence[PILImage.Image | np.ndarray]) -> torch.Tensor:
        """
        Args:
            images: RGB images, or uint8 arrays of shape `(height, width, 3)`.

        Returns:
            `torch.FloatTensor` of shape `(images, 3, height, width)`.
        """
        pixels = self.eight_bit(images)
        return self._process(images) if pixels is None else look_up(pixels, self.table)

    def eight_bit(self, images: Sequence[PILImage.Image | np.ndarray]) -> torch.Tensor | None:
        """
        A quarter of the bytes, which [`look_up`] with `table` makes the pixel values of.

        Returns:
            `torch.ByteTensor` of shape `(images, 3, height, width)`, or None if this processor's values are not to be
            looked up.
        """
        if self._looks_up is None:
            self._looks_up = self._agrees(images[0])
        if not self._looks_up:
            return None
        arrays = [self._resized(image) for image in images]
        pixels = torch.empty(len(arrays), 3, *arrays[0].shape[:2], dtype=torch.uint8)
        for array, out in zip(arrays, pixels.numpy(), strict=True):
            out[:] = array.transpose(2, 0, 1)
        return pixels

    def _process(self, images: Sequence[Any], **options: Any) -> torch.Tensor:
        images = [PILImage.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
        return self.image_processor(images=images, return_tensors="pt", **options)["pixel_values"]

    def _agrees(self, image: Any) -> bool:
        values = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)  # (1, 256, 3)
        try:
            table = self._process([values], do_resize=False, do_center_crop=False)
            self.table = table.reshape(3, 256).contiguous()
            expected = self._process([image])
            self._size = width, height = tuple(expected.shape[:1:-1])
            wide, high = _noise(3 * width + 5, 2 * height + 1), _noise(2 * width + 1, 3 * height + 5)
            self._by_pil = self._pil_agrees([image, wide, high, _noise(width // 2 + 1, height // 3 + 1)])
            noise = _noise(width, height)
            self._keeps_it = np.array_equal(self._geometry(noise), noise)
            pixels = torch.from_numpy(np.ascontiguousarray(self._resized(image).transpose(2, 0, 1)))
            return torch.equal(look_up(pixels[None], self.table), expected)
        except (TypeError, ValueError, KeyError, RuntimeError):  # options or outputs that this processor does not have
            return False

    def _pil_agrees(self, images: Sequence[Any]) -> bool:
        try:
            return all(np.array_equal(self._pil_geometry(image), self._geometry(image)) for image in images)
        except (TypeError, ValueError, KeyError, AttributeError):
            return False

    def _resized(self, image: Any) -> np.ndarray:
        """uint8 `(height, width, 3)`: the processor's geometry without its arithmetic."""
        size = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
        if "transparency" in getattr(image, "info", ()):  # which the processor may lay on a ground of its own
            return self._geometry(image)
        if self._keeps_it and size == self._size:
            return np.asarray(image)
        return self._pil_geometry(image) if self._by_pil else self._geometry(image)

    def _geometry(self, image: Any) -> np.ndarray:
        values = self._process([image], do_rescale=False, do_normalize=False)[0]
        return values.to(torch.uint8).permute(1, 2, 0).numpy()

    def _pil_geometry(self, image: Any) -> np.ndarray:
        """What a processor does that resizes to a size or a shortest edge, and then crops the centre."""
        processor = self.image_processor
        image = PILImage.fromarray(image) if isinstance(image, np.ndarray) else image
        if processor.do_resize:
            size = {key: value for key, value in dict(processor.size).items() if value is not None}
            if size.keys() == {"shortest_edge"}:  # the longer one is rounded down
                edge, short = size["shortest_edge"], min(image.size)
                scaled = tuple(edge if side == short else int(edge * side / short) for side in image.size)
            elif size.keys() == {"height", "width"}:
                scaled = size["width"], size["height"]
            else:
                raise ValueError(f"a size by {list(size)}")
            image = image.resize(scaled, resample=processor.resample)
        if getattr(processor, "do_center_crop", False):
            crop = dict(processor.crop_size)
            left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
            image = image.crop((left, top, left + crop["width"], top + crop["height"]))
        return np.asarray(image)


def _noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
