"""Data that would be silently wrong: unusual pixels, captions equal to the model, batches without negatives."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import make_model, make_pairs, make_processor, make_tokenizer, png

from gmail_hf import GmailTrainer, embed_images
from gmail_hf.captioners import caption_embeds
from gmail_hf.training.checks import check_pairs
from gmail_hf.training.data import BadImageError, GmailCollator, caption_ids, decode_image, stable_id, undecoded


def cell(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("opened", [False, True])
def test_sixteen_bits_are_scaled_to_eight(kind, opened):
    values = np.array([[0, 257, 128 * 257, 65535], [256, 1000, 30000, 65000]], np.uint16)
    raw = cell(Image.fromarray(values), kind)
    image = decode_image(Image.open(io.BytesIO(raw["bytes"])) if opened else raw)
    expected = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(image), np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_range_are_a_bad_image(dtype):
    with pytest.raises(BadImageError, match="image cannot be read .*convert it to 8 bits"):
        decode_image(cell(Image.fromarray(np.zeros((4, 4), dtype)), "TIFF"))


def transparent(mode):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    if mode == "RGB":
        return cell(Image.fromarray(pixels[..., :3]), transparency=tuple(map(int, pixels[0, 0, :3])))
    if mode == "P":
        palette = Image.fromarray(pixels[..., :3]).quantize(16)
        return cell(palette, transparency=bytes(range(0, 256, 16)))
    return cell(Image.fromarray(pixels).convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_training_and_serving_see_the_same_pixels(mode, clip_folder):
    """By the collator, by embeddings, and by the README's call of the processor."""
    raw, processor = transparent(mode), make_processor()
    image = Image.open(io.BytesIO(raw["bytes"]))
    served = processor(images=[image], return_tensors="pt")["pixel_values"]
    row = {"real_image": raw, "generated_image": raw, "caption": "a", "image_id": "b"}
    batch = GmailCollator(processor)([row])
    torch.testing.assert_close(batch["real_pixel_values"], served, rtol=0, atol=1e-6)
    assert (decode_image(raw).tobytes() == Image.open(io.BytesIO(raw["bytes"])).convert("RGB").tobytes()) is False
    model = make_model(clip_folder)
    with torch.no_grad():
        features = model.get_image_features(served, modality="gen").pooler_output
    embeds = embed_images(model, processor, [raw], "gen")
    np.testing.assert_allclose(embeds, torch.nn.functional.normalize(features).numpy(), atol=1e-6)


def test_captions_are_equal_if_the_model_cannot_tell_them_apart():
    same = ["a cat", "A cat", "a cat\n", " a  cat "]
    for tokenizer in (make_tokenizer(), None):
        ids = caption_ids([*same, "a cab"], tokenizer)
        assert len(set(ids[:4])) == 1 and ids[4] != ids[0]
    rows = [{"caption": text, "image_id": str(i), "generated_image": png(i)} for i, text in enumerate(same)]
    assert GmailCollator(make_processor())(rows)["caption_ids"].unique().numel() == 1
    cut = caption_ids(["abcd" * 20 + "x", "abcd" * 20 + "y"], make_tokenizer(), truncation=True, max_length=40)
    assert cut[0] == cut[1]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_missing_ids_are_refused(value):
    with pytest.raises(ValueError, match="empty `image_id`"):
        stable_id(value)
    pairs = (
        make_pairs(12).remove_columns("image_id").add_column("image_id", [float(i) for i in range(10)] + [value, 11.0])
    )
    with pytest.raises(ValueError, match="Row 10 of train_dataset has no 'image_id'"):
        check_pairs(pairs)


@pytest.mark.parametrize("column", ["caption", "image_id"])
def test_the_remedy_for_missing_cells_works_as_written(column):
    """Next to an image that cannot be read."""
    pairs = make_pairs(12, bad_real=(9,))
    values = [None if i == 10 else f"{column} {i}" for i in range(12)]
    pairs = pairs.remove_columns(column).add_column(column, values)
    with pytest.raises(ValueError, match=f"has no '{column}'") as error:
        check_pairs(pairs)
    remedy = str(error.value).split("`")[1]
    fixed = eval(remedy, {"dataset": pairs})
    assert fixed[column][:] == [value for value in values if value]
    check_pairs(fixed)


def test_a_transform_is_refused_in_one_sentence(clip_folder, arguments):
    pairs = make_pairs(8)
    pairs.set_transform(lambda batch: batch)
    for use in (
        lambda: undecoded(pairs),
        lambda: GmailTrainer(make_model(clip_folder), arguments(), pairs, processing_class=make_processor()),
    ):
        with pytest.raises(ValueError, match="has a transform .*`dataset.reset_format"):
            use()
    pairs.reset_format()
    GmailTrainer(make_model(clip_folder), arguments(), pairs, processing_class=make_processor())


def test_a_batch_of_one_pair_is_refused(clip_folder, arguments):
    def make(pairs=8, **fields):
        GmailTrainer(
            make_model(clip_folder),
            arguments(**{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, **fields}),
            make_pairs(pairs),
            processing_class=make_processor(),
        )

    for fields in ({}, {"pairs": 1, "per_device_train_batch_size": 4}):
        with pytest.raises(ValueError, match="batch of one pair has no negatives"):
            make(**fields)
    make(consistency_weight=1.0)


def test_batches_without_negatives_are_reported(train, caplog):
    alternating = make_pairs(8, captions=["a cat"] * 4 + ["a dog"] * 4)
    train(alternating, max_steps=2, per_device_train_batch_size=2, train_sampling_strategy="sequential")
    assert "align_loss was 0 in each of the last 1 steps: no pair had a negative" in caplog.text
    caplog.clear()
    train(make_pairs(8), max_steps=2)
    assert "no pair had a negative" not in caplog.text


def test_embeddings_of_unreadable_images_are_not_captioned():
    embeds = np.ones((3, 8), np.float32)
    embeds[1] = np.nan
    with pytest.raises(ValueError, match="embedding in row 1 is not finite"):
        caption_embeds(None, None, embeds)


def test_rows_without_images_are_no_transform():
    assert undecoded(Dataset.from_dict({"a": [1]}).with_format("numpy"))[0]["a"] == 1
