"""Looked-up pixel values are the processor's own, bit for bit."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from gmail_hf.generation.prepare import prepare_pairs
from gmail_hf.training.data import GmailCollator, undecoded
from gmail_hf.training.pixels import PixelValues, look_up, raw_pixels

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
        """Crops beside the centre where there is something to crop."""

        def center_crop(self, image, *args, **kwargs):
            shifted = np.roll(image, image.shape[-1] > 24, axis=-1)
            return super().center_crop(shifted, *args, **kwargs)

    processor = Shifted(size={"shortest_edge": 24}, crop_size=SQUARE)
    values, images = PixelValues(processor), [*pictures(((24, 24),)), *pictures()]  # of the first, PIL makes the same
    assert torch.equal(values(images), expected(processor, images)) and values.eight_bit(images) is not None


@pytest.mark.parametrize("name", ["two edges", "padded"])
def test_processors_of_other_kinds_serve_themselves(name):
    options = {"size": {"shortest_edge": 24, "longest_edge": 40}} if name == "two edges" else {}
    options |= {"do_pad": True, "pad_size": {"height": 30, "width": 30}} if name == "padded" else {}
    processor = CLIPImageProcessor(**{"size": {"shortest_edge": 24}, "crop_size": SQUARE} | options)
    images = pictures(((24, 24), (90, 30)))
    assert torch.equal(PixelValues(processor)(images), expected(processor, images))


def test_transparency_is_laid_on_the_processors_ground():
    buffer = io.BytesIO()
    pictures(((24, 24),))[0].save(buffer, "PNG", transparency=(1, 2, 3))
    transparent = Image.open(buffer)
    transparent.load()
    assert "transparency" in transparent.info
    images = [*pictures(((24, 24),)), transparent]
    processor = PROCESSORS["clip"]
    assert torch.equal(PixelValues(processor)(images), expected(processor, images))


def test_a_table_in_parts_is_refused():
    with pytest.raises(ValueError, match="2 rows for 3 channels.*accelerate launch"):
        look_up(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, 256))


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
