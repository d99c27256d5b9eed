"""Pixel values are the processor's own, but for rounding."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    ViTImageProcessor,
)

from gmail_hf.generation.prepare import prepare_pairs
from gmail_hf.training.data import GmailCollator, undecoded
from gmail_hf.training.images import PixelValues, raw_pixels

SIZES = ((40, 30), (24, 24), (30, 61), (100, 30), (7, 5), (48, 48), (25, 24))  # width and height
SQUARE = {"height": 24, "width": 24}
CROPPED = {"size": {"shortest_edge": 24}, "crop_size": SQUARE}
PROCESSORS = {
    "clip": CLIPImageProcessor(**CROPPED),
    "squashed": CLIPImageProcessor(size=SQUARE, do_center_crop=False, image_mean=[0.1, 0.5, 0.9]),
    "vit": ViTImageProcessor(size=SQUARE),
    "crop larger than the image": CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=SQUARE),
    "not resized": CLIPImageProcessor(do_resize=False, crop_size=SQUARE),
    "only rescaled": CLIPImageProcessor(**CROPPED, do_normalize=False),
    "only normalised": CLIPImageProcessor(
        **CROPPED, do_rescale=False, image_mean=[120, 110, 100], image_std=[60, 70, 80]
    ),
    "raw": CLIPImageProcessor(**CROPPED, do_rescale=False, do_normalize=False),
    "two edges": CLIPImageProcessor(crop_size=SQUARE, size={"shortest_edge": 24, "longest_edge": 40}),
}
# Those of vision-language models, which cut images into tiles or crops.
TILED = {
    "idefics3": Idefics3ImageProcessorPil(do_resize=False, max_image_size={"longest_edge": 24}),
    "llava_next": LlavaNextImageProcessorPil(**CROPPED, image_grid_pinpoints=[[24, 48], [48, 24]]),
    "llava_onevision": LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=[[24, 48], [48, 24]]),
    "gemma3": Gemma3ImageProcessorPil(size=SQUARE, do_pan_and_scan=True, pan_and_scan_min_crop_size=8),
    "internvl": GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
}


def pictures(sizes=SIZES):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def expected(processor, images):
    return processor(images=images, return_tensors="pt")["pixel_values"]


def assert_same_values(found, processor, images):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(processor, images).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_values_are_the_processors(name):
    values = PixelValues(PROCESSORS[name])
    for images in (pictures(), pictures(((24, 24),))):
        assert_same_values(values(images), PROCESSORS[name], images)
        assert_same_values(values([np.asarray(image) for image in images]), PROCESSORS[name], images)


@pytest.mark.parametrize("name", TILED)
def test_a_vision_language_models_processor_gives_the_whole_image_alone(name):
    """One row per image: one of the tile's size as it is, others resized to it."""
    processor, images = TILED[name], pictures(((24, 24), (100, 30), (30, 61)))
    inputs = PixelValues(processor).inputs(images)
    assert inputs.keys() == {"pixel_values"} and inputs["pixel_values"].shape == (3, 3, 24, 24)
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = np.asarray(images[0]).transpose(2, 0, 1)
    expected = torch.from_numpy((pixels / 255 - mean) / std).float()
    torch.testing.assert_close(torch.as_tensor(inputs["pixel_values"])[0].float(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_eight_bit(name):
    values, images = PixelValues(PROCESSORS[name]), pictures()
    pixels = values.eight_bit(images)
    assert pixels.dtype == torch.uint8 and values.mean.shape == values.std.shape == (3,)
    mean, std = values.mean[:, None, None], values.std[:, None, None]
    assert_same_values((pixels - mean) / std, PROCESSORS[name], images)


@pytest.mark.parametrize("name", ["clip", "squashed", "vit", "crop larger than the image", "not resized"])
def test_common_processors_are_not_called_for_each_image(name, monkeypatch):
    values, images = PixelValues(PROCESSORS[name]), pictures()
    wanted = expected(PROCESSORS[name], images)
    monkeypatch.setattr(values, "_process", None)
    torch.testing.assert_close(values(images), wanted, rtol=0, atol=1e-6)


class Shifted(type(PROCESSORS["clip"])):
    """Crops off centre."""

    def center_crop(self, image, *args, **kwargs):
        return super().center_crop(np.roll(image, image.shape[-1] > 24, axis=-1), *args, **kwargs)


class Centred(type(PROCESSORS["clip"])):
    """Subtracts each image's own mean."""

    def _preprocess(self, images, **kwargs):
        features = super()._preprocess(images, **kwargs)
        values = features["pixel_values"].float()
        features["pixel_values"] = values - values.mean((1, 2, 3), keepdim=True)
        return features


class Smooth(type(PROCESSORS["clip"])):
    """Resizes to fractions of a grey level."""

    def resize(self, image, size, **kwargs):
        return super().resize(image, size, **kwargs) * np.float32(0.999)


@pytest.mark.parametrize(
    ("processor", "is_eight_bit"),
    [
        (Shifted(**CROPPED), True),
        (Centred(**CROPPED), False),
        (Smooth(**CROPPED), False),
        (CLIPImageProcessor(**CROPPED, do_pad=True, pad_size={"height": 30, "width": 30}), False),
    ],
    ids=["shifted", "centred", "smooth", "padded"],
)
def test_processors_with_their_own_steps_are_called(processor, is_eight_bit):
    assert_same_values(PixelValues(processor)(pictures()), processor, pictures())
    assert (PixelValues(processor).eight_bit(pictures()) is not None) == is_eight_bit


def test_transparency_is_composited_as_by_the_processor():
    buffer = io.BytesIO()
    pictures(((24, 24),))[0].save(buffer, "PNG", transparency=(1, 2, 3))
    transparent = Image.open(buffer)
    transparent.load()
    assert "transparency" in transparent.info
    images = [*pictures(((24, 24),)), transparent]
    assert_same_values(PixelValues(PROCESSORS["clip"])(images), PROCESSORS["clip"], images)


def test_prepared_pairs_give_the_same_batch_without_an_image_library(pairs, processor, tmp_path, monkeypatch):
    prepared = undecoded(prepare_pairs(pairs, processor, tmp_path / "prepared"))
    original = GmailCollator(processor)([pairs[row] for row in range(4)])
    monkeypatch.setattr(Image, "open", None)
    batch = GmailCollator(processor)([prepared[row] for row in range(4)])
    for name in ("real_pixel_values", "generated_pixel_values"):
        assert torch.equal(batch[name], original[name])


@pytest.mark.parametrize("content", [None, b"", b"P6 2 2 255\n" + bytes(11), b"P6\n2 2\n255\n" + bytes(12)])
def test_what_was_not_prepared_is_left_to_the_image_library(content):
    assert raw_pixels(content) is None


def test_raw_pixels_are_what_the_image_library_reads():
    content = b"P6 40 30 255\n" + np.asarray(pictures()[0]).tobytes()
    with Image.open(io.BytesIO(content)) as opened:
        assert np.array_equal(raw_pixels(content), np.asarray(opened))
