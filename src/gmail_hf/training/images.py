"""An image processor in two steps: uint8 pixels, and the normalisation, which is faster on a GPU."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch.nn.utils.rnn import pad_sequence
from transformers import PilBackend
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import SizeDict

from .decoding import within_bounds

# The header of a prepared image, see `prepare_pairs`. Raw pixels follow it.
PREPARED = re.compile(rb"P6 (\d{1,6}) (\d{1,6}) 255\n")
COUNTS = ("num_crops", "num_soft_tokens_per_image")  # outputs for the text of Gemma 3 and Gemma 4
# Options of the processors of vision-language models that cut images into tiles or crops.
TILINGS = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")


def raw_pixels(content: bytes | None) -> np.ndarray | None:
    """The pixels of a prepared image as a view, uint8 `(height, width, 3)`; None for any other file."""
    header = PREPARED.match(content, 0, 32) if content else None
    if header is None:
        return None
    width, height = map(int, header.groups())
    if len(content) != header.end() + 3 * width * height or not within_bounds(width, height):
        return None
    return np.frombuffer(content, np.uint8, offset=header.end()).reshape(height, width, 3)


class PixelValues:
    """
    `image_processor(images=images, return_tensors="pt")["pixel_values"]` in two steps: the processor resizes and crops
    to uint8 pixels, and the model's device computes `(pixels - mean) / std`.

    The values differ from the processor's by rounding, at most 1e-6. A processor that overrides rescaling or
    normalisation runs unchanged.

    Args:
        image_processor: an image processor of transformers.

    Attributes:
        mean, std (`torch.FloatTensor` of shape `(3,)`): the processor's mean and standard deviation in units of the
            uint8 pixels; None for a processor that runs unchanged.
    """

    def __init__(self, image_processor: Any):
        self.image_processor = processor = image_processor
        self._whole = {name: False for name in TILINGS if hasattr(processor, name)}
        self.mean: torch.Tensor | None = None
        self.std: torch.Tensor | None = None
        # Padding is the last step: its zeros are normalised values, not pixels.
        padded = getattr(processor, "do_pad", False)
        if not padded and _inherits(processor, "_preprocess", "rescale", "normalize", "rescale_and_normalize"):
            unit = 1 / processor.rescale_factor if processor.do_rescale else 1.0
            mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
            self.mean, self.std = (torch.tensor(np.broadcast_to(v, 3) * unit).float() for v in (mean, std))
        self._size: dict[str, int] | None = None
        if self.mean is not None and _inherits(processor, "resize", "center_crop"):
            self._size = dict(processor.size) if processor.do_resize else {}
        self._crop = SizeDict(**dict(processor.crop_size)) if getattr(processor, "do_center_crop", False) else None

    def __call__(self, images: Sequence[PILImage.Image | np.ndarray]) -> torch.Tensor:
        """
        Args:
            images: RGB images, or uint8 arrays of shape `(height, width, 3)`.

        Returns:
            `torch.FloatTensor` of shape `(images, 3, height, width)`.
        """
        pixels = self.eight_bit(images)
        if pixels is None:
            return self._process(images)
        return pixels.float().sub_(self.mean[:, None, None]).div_(self.std[:, None, None])

    def inputs(self, images: Sequence[PILImage.Image | np.ndarray]) -> dict[str, torch.Tensor]:
        """
        The inputs of a model, one row per image: `pixel_values`, and any other output of its processor, such as
        `spatial_shapes`. Packed patches, as for Qwen-VL, are padded to `(images, patches, values)`. If a processor can
        also return tiles or crops of an image, only the complete image is returned.
        """
        if len(self.image_processor.model_input_names) == 1:
            return {"pixel_values": self(images)}
        inputs = dict(self.image_processor(images=list(images), return_tensors="pt", **self._whole))
        if inputs["pixel_values"].dim() == 5:
            # Idefics 3, SmolVLM: all images in one text. LLaVA-NeXT, LLaVA-OneVision: the whole image, then tiles.
            joined = "do_image_splitting" in self._whole
            return {"pixel_values": inputs["pixel_values"][0] if joined else inputs["pixel_values"][:, 0]}
        for name in COUNTS:
            inputs.pop(name, None)
        if "image_grid_thw" in inputs:
            patches = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(dim=-1).tolist())
            inputs["pixel_values"] = pad_sequence(patches, batch_first=True)
        return inputs

    def eight_bit(self, images: Sequence[PILImage.Image | np.ndarray]) -> torch.Tensor | None:
        """
        Resized and cropped images, a quarter of the bytes of their pixel values.

        Returns:
            `torch.ByteTensor` of shape `(images, 3, height, width)`, or None for a processor that runs unchanged.
        """
        if self.mean is None or len(self.image_processor.model_input_names) > 1:
            return None
        arrays = [self._resized(image) for image in images]
        if any(array.dtype != np.uint8 for array in arrays):
            return None
        pixels = torch.empty(len(arrays), *arrays[0].shape, dtype=torch.uint8)
        np.stack(arrays, out=pixels.numpy())
        return pixels

    def _process(self, images: Sequence[Any], **options: Any) -> torch.Tensor:
        images = [PILImage.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
        options |= self._whole
        return self.image_processor(images=images, return_tensors="pt", **options)["pixel_values"]

    def _resized(self, image: PILImage.Image | np.ndarray) -> np.ndarray:
        """Only the processor's resizing and cropping, `(3, height, width)`."""
        size = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
        scaled = self._scaled(size)
        # The processor composites transparent images onto white, even RGB ones.
        if scaled is not None and "transparency" not in getattr(image, "info", ()):
            if scaled == size and (self._crop is None or (self._crop.height, self._crop.width) == size):
                return np.asarray(image).transpose(2, 0, 1)
            if isinstance(self.image_processor, PilBackend):
                return self._by_pil(image, scaled)
        return self._process([image], do_rescale=False, do_normalize=False)[0].numpy()

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of an image of `size` after resizing; None if only the processor can tell."""
        if self._size is None:
            return None
        if not self._size:
            return size
        if self._size.keys() == {"shortest_edge"}:
            array = np.broadcast_to(np.uint8(0), (3, *size))
            edge = self._size["shortest_edge"]
            return get_resize_output_image_size(
                array, edge, default_to_square=False, input_data_format="channels_first"
            )
        return (self._size["height"], self._size["width"]) if self._size.keys() == {"height", "width"} else None

    def _by_pil(self, image: PILImage.Image | np.ndarray, scaled: tuple[int, int]) -> np.ndarray:
        """The steps of `PilBackend`, without copying the image to NumPy and back."""
        processor = self.image_processor
        image = PILImage.fromarray(image) if isinstance(image, np.ndarray) else image
        pixels = processor.resize(image, SizeDict(height=scaled[0], width=scaled[1]), processor.resample)
        return pixels if self._crop is None else processor.center_crop(pixels, self._crop)


def _inherits(processor: Any, *methods: str) -> bool:
    """Whether an image processor inherits these methods, if they exist, unchanged from transformers."""
    for base in (PilBackend, TorchvisionBackend):
        if isinstance(processor, base):
            return all(getattr(type(processor), name, None) is getattr(base, name, None) for name in methods)
    return False
