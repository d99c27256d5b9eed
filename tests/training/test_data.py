"""Images, ids and the collator: what is skipped, what comes out."""

import io
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IMAGE_SIZE, make_pairs, make_processor, picture, png

from gmail_hf.training.data import BadImageError, GmailCollator, decode_image, stable_id, undecoded

# Images


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = picture(0, "L").convert(mode) if mode == "LA" else picture(0, mode)
    assert decode_image(image).mode == "RGB"
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    for cell in ({"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}):
        assert np.array_equal(np.asarray(decode_image(cell)), np.asarray(image.convert("RGB")))


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "half.png").write_bytes(png(0, truncated=True)["bytes"])
    cells = [
        png(0, truncated=True),
        {"bytes": None, "path": str(tmp_path / "half.png")},
        {"bytes": None, "path": str(tmp_path / "missing.png")},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": None},
        None,
        Image.open(tmp_path / "half.png"),
    ]
    for cell in cells:
        with pytest.raises(BadImageError):
            decode_image(cell)
    with pytest.raises(BadImageError, match="missing.png"):
        decode_image(cells[2])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", [datasets.List, datasets.LargeList])
def test_lists_of_images_stay_raw(kind, streamed):
    cells = [[png(0), png(1, truncated=True)], [], [png(2)]]
    features = datasets.Features({"images": kind(datasets.Image()), "caption": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"images": cells, "caption": ["a", "b", "c"]}, features=features)
    dataset = dataset.to_iterable_dataset() if streamed else dataset.select([2, 0])
    raw = undecoded(dataset)
    expected = cells if streamed else [cells[2], cells[0]]
    assert [row["images"] for row in raw] == expected
    assert dataset.features == features  # the data set itself still decodes
    if not streamed:
        assert raw._fingerprint != dataset._fingerprint  # or what is cached of one would serve the other
        assert raw.data.nbytes == dataset.data.nbytes and not raw.cache_files  # nothing is copied


# Ids


@pytest.mark.integration
def test_stable_id_is_the_same_in_every_process():
    code = "from gmail_hf.training.data import stable_id; print(stable_id('a cat'), stable_id(17))"
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.split() == [str(stable_id("a cat")), str(stable_id(17))], result.stderr
    ids = [stable_id(i) for i in range(1000)]
    assert len(set(ids)) == 1000 and all(0 <= value < 2**63 for value in ids)
    assert stable_id("a cat") != stable_id("a dog")


# Collator


def rows_of(dataset):
    return [undecoded(dataset)[i] for i in range(len(dataset))]


def test_batch_has_the_arguments_of_forward(processor):
    pairs = make_pairs(3, captions=["a cat", "two birds", "a cat"])
    batch = GmailCollator(processor, with_text=True)(rows_of(pairs))
    shape = (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
        "generated_pixel_values": (shape, torch.float32),
        "real_pixel_values": (shape, torch.float32),
        "image_ids": ((3,), torch.int64),
        "caption_ids": ((3,), torch.int64),
        "input_ids": ((3, 10), torch.int64),
        "attention_mask": ((3, 10), torch.int64),
        "skipped_pairs": ((), torch.int64),
    }
    assert batch["caption_ids"][0] == batch["caption_ids"][2] != batch["caption_ids"][1]
    assert len(set(batch["image_ids"].tolist())) == 3
    assert batch["attention_mask"].sum(dim=1).tolist() == [6, 10, 6]
    expected = processor.image_processor(images=[decode_image(png(1))], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(batch["generated_pixel_values"][0], expected, rtol=0, atol=1e-6)


def test_eight_bit_batches_hold_the_same_values_in_fewer_bytes(processor):
    rows = rows_of(make_pairs(3, bad_generated=(1,)))
    whole, batch = GmailCollator(processor)(rows), GmailCollator(processor, eight_bit=True)(rows)
    scale = {name: batch.pop(name) for name in ("pixel_mean", "pixel_std")}
    assert batch.keys() == whole.keys()
    assert {(tuple(values.shape), values.dtype) for values in scale.values()} == {((3,), torch.float32)}
    mean, std = (values[:, None, None] for values in scale.values())
    for name in whole:
        if name.endswith("pixel_values"):
            assert batch[name].dtype == torch.uint8
            torch.testing.assert_close((batch[name] - mean) / std, whole[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(batch[name], whole[name])
    empty = GmailCollator(processor, eight_bit=True)(rows[1:2])
    assert all(torch.equal(empty[name], values) for name, values in scale.items())
    assert empty["generated_pixel_values"].shape == (0, *batch["generated_pixel_values"].shape[1:])


def test_cached_embeddings_take_the_place_of_real_images(processor):
    rows = [{**row, "real_embeds": [float(i)] * 4} for i, row in enumerate(rows_of(make_pairs(2)))]
    batch = GmailCollator(processor.image_processor)(rows)
    assert "real_pixel_values" not in batch and "input_ids" not in batch
    assert batch["real_embeds"].tolist() == [[0.0] * 4, [1.0] * 4] and batch["real_embeds"].dtype == torch.float32


@pytest.mark.parametrize("bad", [{"bad_real": (1,)}, {"bad_generated": (1,)}], ids=str)
def test_bad_pair_is_named_counted_and_skipped(processor, bad, caplog):
    rows = rows_of(make_pairs(4, **bad))
    batch = GmailCollator(processor, with_text=True)(rows)
    good = GmailCollator(processor, with_text=True)([rows[0], rows[2], rows[3]])
    assert batch.pop("skipped_pairs") == 1 and good.pop("skipped_pairs") == 0
    assert all(torch.equal(batch[name], good[name]) for name in good) and batch.keys() == good.keys()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "image_id id-1 is skipped" in caplog.text
    with pytest.raises(ValueError, match="image_id id-1"):
        GmailCollator(processor, on_bad_image="error")(rows)


@pytest.mark.parametrize("missing", [None, [float("nan")] * 2, [1.0, float("inf")]], ids=str)
def test_pair_without_an_embedding_is_skipped(processor, caplog, missing):
    rows = [{**row, "real_embeds": [1.0, 0.0]} for row in rows_of(make_pairs(3))]
    rows[0]["real_embeds"] = missing
    batch = GmailCollator(processor)(rows)
    assert batch["skipped_pairs"] == 1 and batch["real_embeds"].shape == (2, 2)
    assert "id-0" in caplog.text


@pytest.mark.parametrize("with_embeds", [False, True])
def test_batch_without_one_readable_pair_is_empty(processor, with_embeds):
    rows = rows_of(make_pairs(2, bad_generated=(0, 1)))
    if with_embeds:
        rows = [{**row, "real_embeds": [1.0, 0.0]} for row in rows]
    batch = GmailCollator(processor, with_text=True)(rows)
    assert batch.pop("skipped_pairs") == 2
    good = GmailCollator(processor, with_text=True)(
        [{**row, "real_embeds": [1.0, 0.0]} if with_embeds else row for row in rows_of(make_pairs(2))]
    )
    good.pop("skipped_pairs")
    assert batch.keys() == good.keys()
    assert all(len(batch[name]) == 0 and batch[name].dtype == good[name].dtype for name in good)
    assert batch["generated_pixel_values"].shape[1:] == good["generated_pixel_values"].shape[1:]
    if with_embeds:
        assert batch["real_embeds"].shape == (0, 2)


@pytest.mark.parametrize("column", ["image_id", "caption"])
def test_pair_without_id_or_caption_is_refused(processor, column):
    pairs = make_pairs(4)
    rows = [{**row, column: None if i == 1 else row[column]} for i, row in enumerate(rows_of(pairs))]
    with pytest.raises(ValueError, match="empty `image_id` or `caption`"):
        GmailCollator(processor)(rows)


def test_photograph_on_its_side_is_turned_upright_as_datasets_does():
    photograph = Image.effect_noise((16, 8), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    buffer = io.BytesIO()
    photograph.save(buffer, format="PNG", exif=exif)
    raw = {"bytes": buffer.getvalue(), "path": None}
    decoded = datasets.Image().decode_example(dict(raw))
    assert decode_image(raw).size == decoded.size == (8, 16)
    assert decode_image(raw).tobytes() == decode_image(decoded).tobytes() == decoded.convert("RGB").tobytes()


def test_collator_settings_are_checked():
    processor = make_processor()
    with pytest.raises(ValueError, match="on_bad_image.*ignore"):
        GmailCollator(processor, on_bad_image="ignore")
    with pytest.raises(ValueError, match="tokenizer"):
        GmailCollator(processor.image_processor, with_text=True)
