"""Looked-up pixel values are the processor's own, bit for bit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from gmail_hf.data import GmailCollator, undecoded
from gmail_hf.generation.prepare import prepare_pairs
from gmail_hf.pixels import PixelValues, look_up, raw_pixels

SIZES = ((40, 30), (24, 24), (30, 61))  # width and height
SQUARE = {"height": 24, "width": 24}
PROCESSORS = {
    "clip": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE),
    "squashed": CLIPImageProcessor(size=SQUARE, do_center_crop=False, image_mean=[0.1, 0.5, 0.9]),
    "vit": ViTImageProcessor(size=SQUARE),
    "raw": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE, do_rescale=False, do_normalize=False),
}


def pictures(sizes=SIZES):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def expected(processor, images):
    return processor(images=images, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", PROCESSORS)
def test_equals_the_processor(name):
    values = PixelValues(PROCESSORS[name])
    for images in (pictures(), pictures()[::-1], pictures(((24, 24),))):
        found = values(images)
        assert found.dtype == expected(PROCESSORS[name], images).dtype
        assert torch.equal(found, expected(PROCESSORS[name], images))


@pytest.mark.parametrize("name", PROCESSORS)
def test_eight_bits_and_a_table_are_the_processors_values(name):
    values = PixelValues(PROCESSORS[name])
    for images in (pictures(), [np.asarray(image) for image in pictures()]):
        pixels = values.eight_bit(images)
        assert pixels.dtype == torch.uint8 and values.table.shape == (3, 256)
        assert torch.equal(look_up(pixels, values.table), expected(PROCESSORS[name], pictures()))


@pytest.mark.parametrize("name", PROCESSORS)
def test_pil_alone_resizes_and_crops(name, monkeypatch):
    values = PixelValues(PROCESSORS[name])
    values(pictures()[:1])
    monkeypatch.setattr(values, "_geometry", None)  # the processor is asked no more
    images = pictures(((100, 30), (31, 99), (7, 5), (24, 24), (48, 48), (25, 24)))
    assert torch.equal(values(images), expected(PROCESSORS[name], images))


def test_a_processor_with_a_geometry_of_its_own_serves_itself():
    class Shifted(type(PROCESSORS["clip"])):
        """Crops beside the centre where it crops at all."""

        def center_crop(self, image, *args, **kwargs):
            return super().center_crop(np.roll(image, 1, axis=-1), *args, **kwargs)

    processor = Shifted(size={"shortest_edge": 24}, crop_size=SQUARE)
    assert torch.equal(PixelValues(processor)(pictures()), expected(processor, pictures()))


def test_a_processor_that_looks_at_its_neighbours_serves_itself():
    class Centred(type(PROCESSORS["clip"])):
        """Subtracts the mean of each image, so that equal values do not stay equal."""

        def _preprocess(self, images, **kwargs):
            features = super()._preprocess(images, **kwargs)
            values = features["pixel_values"].float()
            features["pixel_values"] = values - values.mean((1, 2, 3), keepdim=True)
            return features

    processor = Centred(size={"shortest_edge": 24}, crop_size=SQUARE)
    assert torch.equal(PixelValues(processor)(pictures()), expected(processor, pictures()))
    assert PixelValues(processor).eight_bit(pictures()) is None


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
