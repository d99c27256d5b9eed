"""What a shard does with captions and images that make trouble, on a pipeline that paints its random numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image
from tiny import make_processor

from gmail_hf.generation import generate_shard
from gmail_hf.generation.captions import Captions
from gmail_hf.generation.sampler import row_seed

SETTINGS = {
    "images_per_caption": 2,
    "batch_size": 4,
    "seed": 3,
    "image_format": "png",
    "safety_policy": "keep",
    "generator": "painter",
    "generator_revision": "1",
    "scheduler": None,
    "num_inference_steps": 1,
    "guidance_scale": None,
    "negative_prompt": "blur",
    "dtype": "float32",
    "gmail_hf_version": "0",
}


class Tokenizer:
    model_max_length = 5

    def __call__(self, text: str) -> SimpleNamespace:
        if "\0" in text:
            raise RuntimeError("cannot encode")
        return SimpleNamespace(input_ids=text.split())


class Painter:
    """Grey noise by each row's random generator; knows how many images fit, and which captions are unsafe."""

    tokenizer = Tokenizer()

    def __init__(self, fits: int = 100, unsafe: tuple[str, ...] | None = None):
        self.fits, self.unsafe, self.batches = fits, unsafe, []

    def __call__(self, prompt, generator, negative_prompt, **call):
        assert negative_prompt == ["blur"] * len(prompt)
        self.batches.append(len(prompt))
        if len(prompt) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        noise = [torch.randint(256, (8, 8), generator=random, dtype=torch.uint8).numpy() for random in generator]
        flags = None if self.unsafe is None else [text in self.unsafe for text in prompt]
        return SimpleNamespace(images=[Image.fromarray(image) for image in noise], nsfw_content_detected=flags)


@pytest.fixture
def captions(make_args):
    texts = ["a cat", "a dog", "six words are one too many", "birds", "bad\0bytes", "a fish"]
    return Captions(Dataset.from_dict({"caption": texts}), make_args())


def shard(pipeline, captions, rows=range(12), **changes) -> list[dict]:
    table = generate_shard(pipeline, captions, rows, SETTINGS | changes, {"negative_prompt": "blur"})
    return list(Dataset(table, info=None).cast(Features.from_arrow_schema(table.schema)))


def images(rows) -> np.ndarray:
    return np.stack([np.asarray(row["generated_image"]) for row in rows])


def test_rows_and_provenance(captions):
    rows = shard(Painter(), captions, range(2, 6))
    assert [(row["caption_id"], row["index"]) for row in rows] == [("1-0", 0), ("1-0", 1), ("2-0", 0), ("2-0", 1)]
    assert rows[1]["seed"] == row_seed(3, "1-0", 1) and rows[1]["negative_prompt"] == "blur"
    expected = torch.randint(256, (8, 8), generator=torch.Generator().manual_seed(rows[1]["seed"]), dtype=torch.uint8)
    np.testing.assert_array_equal(images(rows)[1][:, :, 0], expected)


def test_seeds_differ_by_run_caption_and_index():
    assert len({row_seed(seed, name, index) for seed in (0, 1) for name in ("a", "b") for index in (0, 1)}) == 8
    assert row_seed(0, "a", 0) == 2290199993486840126


def test_batches_follow_from_the_shard(captions):
    painter = Painter()
    rows = shard(painter, captions, range(0, 7))
    assert painter.batches == [4, 3] and [row["batch_size"] for row in rows] == [4, 4, 4, 4, 3, 3, 3]


def test_long_captions_are_marked_and_counted(captions, caplog):
    rows = shard(Painter(), captions)
    assert {row["caption"] for row in rows if row["truncated"]} == {"six words are one too many"}
    assert "1 captions are longer than 5 tokens and are truncated: ['2-0']" in caplog.text


def test_a_limit_of_the_pipeline_below_its_tokenizers_counts(captions, caplog):
    class Short(Painter):
        def __call__(self, prompt, generator, negative_prompt, max_sequence_length=1):
            return super().__call__(prompt, generator, negative_prompt)

    cut = {row["caption"] for row in shard(Short(), captions) if row["truncated"]}
    assert cut == {"a cat", "a dog", "six words are one too many", "a fish"}
    assert "4 captions are longer than 1 tokens" in caplog.text


def test_caption_that_breaks_the_tokenizer_is_left_out(captions, caplog):
    rows = shard(Painter(), captions)
    assert len(rows) == 10 and "bad\0bytes" not in {row["caption"] for row in rows}
    assert "1 captions are left out, because the tokenizer failed: ['4-0'] (cannot encode)" in caplog.text


def test_out_of_memory_halves_the_batch(captions, caplog):
    painter = Painter(fits=1)
    rows = shard(painter, captions, range(0, 6))
    assert painter.batches == [4, 2, 1, 1, 1, 1, 1, 1]
    assert "batches of 2 instead of 4" in caplog.text and "batches of 1 instead of 4" in caplog.text
    np.testing.assert_array_equal(images(rows), images(shard(Painter(), captions, range(0, 6))))
    assert {row["batch_size"] for row in rows} == {1}


def test_out_of_memory_for_one_image(captions):
    with pytest.raises(torch.OutOfMemoryError):
        shard(Painter(fits=0), captions)


@pytest.mark.parametrize(("policy", "count"), [("keep", 10), ("drop", 8)])
def test_safety_checker(captions, policy, count):
    rows = shard(Painter(unsafe=("a dog",)), captions, safety_policy=policy)
    assert len(rows) == count
    assert [row["caption"] for row in rows if row["nsfw"]] == (["a dog"] * 2 if policy == "keep" else [])
    assert {row["nsfw"] for row in shard(Painter(), captions)} == {None}


def test_verdicts_of_deepfloyd(captions):
    class DeepFloyd(Painter):
        def __call__(self, *args, **call):
            output = super().__call__(*args, **call)
            return SimpleNamespace(images=output.images, nsfw_detected=output.nsfw_content_detected)

    assert len(shard(DeepFloyd(unsafe=("a dog",)), captions, safety_policy="drop")) == 8


def test_a_processor_tokenizes_by_its_tokenizer(captions):
    """FLUX.2 has a processor, whose first argument is an image."""

    class WithProcessor(Painter):
        tokenizer = make_processor()

    WithProcessor.tokenizer.tokenizer.model_max_length = 20
    rows = shard(WithProcessor(), captions)
    assert len(rows) == 12
    assert {row["caption"] for row in rows if row["truncated"]} == {"six words are one too many"}


def test_jpeg(captions):
    rows = shard(Painter(), captions, range(0, 2), image_format="jpeg")
    assert rows[0]["generated_image"].format == "JPEG"
