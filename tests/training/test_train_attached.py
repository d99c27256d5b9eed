"""Stage 1 on towers without a class: `attach_branches`, `GmailTrainer`, `save_branches`, `load_branches`."""

import json

import pytest
import torch
import transformers as t
from peft import PeftModel
from tiny import make_clip, make_pairs, make_processor, picture, pixels, randomise
from towers import IMAGES, SIZES, make
from vlms import VLMS

from gmail_hf import (
    GmailTrainer,
    GmailTrainingArguments,
    attach_branches,
    from_vlm,
    load_branches,
    save_branches,
)
from gmail_hf.branches.tower import adapter_of
from gmail_hf.commands.cli import run
from gmail_hf.training.images import PixelValues


def llava():
    """With CLIP's vision tower, of which the language model reads patch tokens."""
    text = t.LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=99)
    vision = t.CLIPVisionConfig(**IMAGES)
    return t.LlavaForConditionalGeneration(t.LlavaConfig(text_config=text, vision_config=vision, image_token_index=98))


def idefics():
    """A tower without a pooled output, and without the keyword `pixel_values` in first place of its caller."""
    vision = {**IMAGES, "num_channels": 3}
    text = {**SIZES, "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0}
    config = t.Idefics3Config(vision_config=vision, text_config={"model_type": "llama", **text}, scale_factor=1)
    return t.Idefics3Model(config).eval()


OWNERS = {
    "llava": (llava, lambda owner: owner.model.vision_tower, 1),
    "idefics3": (idefics, lambda owner: owner.vision_model, 0),
    "siglip": (lambda: make("siglip"), lambda owner: owner.vision_model, 0),
    "dinov2_with_registers": (lambda: make("dinov2_with_registers"), lambda owner: owner, 3),
    "ijepa": (lambda: t.IJepaModel(t.IJepaConfig(**IMAGES), add_pooling_layer=False), lambda owner: owner, 0),
}
# One that splits images into tiles, of which the tower gets none.
SIZE = {"longest_edge": 16}
PROCESSORS = {"idefics3": t.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size=SIZE)}


def arguments(folder, **fields):
    return GmailTrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[],
        **fields,
    )  # fmt: skip


@pytest.mark.parametrize("name", OWNERS)
def test_the_branches_of_any_model_train(name, tmp_path):
    build, tower_of, prefix = OWNERS[name]
    torch.manual_seed(0)
    owner = build().eval()
    plain = {key: tensor.clone() for key, tensor in owner.state_dict().items()}
    attach_branches(owner)
    tower = tower_of(owner)
    assert tower.prefix_tokens == prefix
    before = {key: tensor.clone() for key, tensor in owner.state_dict().items()}
    args = arguments(tmp_path / "out", token_weight=1.0, save_strategy="steps", save_steps=1)
    processor = PROCESSORS.get(name) or make_processor()
    trainer = GmailTrainer(owner, args, make_pairs(8), make_pairs(8, seed=50), processor)
    trainer.train()
    changed = {key for key, tensor in owner.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and {adapter_of(key) for key in changed} == {"gen"}
    expected = {modality: tower.embed_images(pixels(4), modality).detach() for modality in ("real", "gen")}

    trainer.save_model()
    assert "# out" in (tmp_path / "out/README.md").read_text()
    save_branches(owner, tmp_path / "branches")
    for folder in ("out", "branches"):
        again = build().eval()
        again.load_state_dict(plain)
        load_branches(again, tmp_path / folder)
        for modality, embeds in expected.items():
            torch.testing.assert_close(tower_of(again).embed_images(pixels(4), modality), embeds)

    merged = tower.to_base("gen")
    assert type(merged) is type(tower_of(build()))
    torch.testing.assert_close(pooled(merged), pooled(tower, modality="gen"), atol=1e-5, rtol=1e-5)
    again = build().eval()
    again.load_state_dict(plain)
    plain_tower = tower_of(again)
    PeftModel.from_pretrained(again, tmp_path / "branches" / "gen")  # which changes the model's layers
    torch.testing.assert_close(pooled(plain_tower), pooled(tower, modality="gen"), atol=1e-5, rtol=1e-5)

    resumed = GmailTrainer(owner, args, make_pairs(8), processing_class=make_processor())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))


@pytest.mark.parametrize("pairing", ["none", "optimal"])
def test_captions_are_compared_as_texts_without_a_text_encoder(tmp_path, pairing):
    owner = make_clip()
    attach_branches(owner)
    pairs = make_pairs(8, captions=["a cat", "a dog"] * 4)
    args = arguments(tmp_path / "out", pairing=pairing, recipe="robust")
    assert GmailTrainer(owner, args, pairs, processing_class=make_processor()).train().global_step == 2


@torch.no_grad()
def pooled(tower, **kwargs):
    return tower(pixels(4), **kwargs).last_hidden_state


def test_branches_of_another_tower_are_refused(tmp_path):
    owner = make("siglip")
    attach_branches(owner)
    randomise(owner.vision_model)
    save_branches(owner, tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        load_branches(make("siglip", seed=1), tmp_path)
    with pytest.raises(ValueError, match="lora_rank=2"):
        other = make("siglip")
        attach_branches(other, rank=2)
        load_branches(other, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gmail_attached_siglip_vision_model" and config["lora_rank"] == 4


def test_a_model_without_branches_is_refused(tmp_path):
    with pytest.raises(TypeError, match="CLIPModel has 0. Use `gmail_hf.from_base`"):
        GmailTrainer(make_clip(), arguments(tmp_path), make_pairs(4), processing_class=make_processor())
    with pytest.raises(TypeError, match="attach_branches"):
        save_branches(make_clip(), tmp_path)


def packing_processor(longest: int = 256):
    """Qwen-VL's processor: images of at least 256 pixels become patches of 4 x 4."""
    size = {"shortest_edge": 256, "longest_edge": longest}
    return t.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)


def test_a_tower_of_packed_patches_trains(tmp_path):
    """An embedding is the mean of the merged tokens of an image alone, whatever else is in the batch."""
    owner = make("qwen2_5_vl")
    attach_branches(owner)
    before = {key: tensor.clone() for key, tensor in owner.state_dict().items()}
    args = arguments(tmp_path / "out", token_weight=1.0)
    trainer = GmailTrainer(owner, args, make_pairs(8), make_pairs(8, seed=50), packing_processor())
    trainer.train()
    changed = {key for key, tensor in owner.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and {adapter_of(key) for key in changed} == {"gen"}
    assert trainer.evaluate()["eval_paired_cosine"] < 1
    images = [picture(seed).resize(size) for seed, size in enumerate([(16, 16), (16, 48), (32, 16)])]
    inputs = PixelValues(packing_processor(2048)).inputs(images)
    pixel_values, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    names = ["gen", "real", "gen"]
    embeds = owner.embed_images(pixel_values, names, image_grid_thw=grid)
    for row, modality in enumerate(names):
        alone = packing_processor(2048)(images=[images[row]], return_tensors="pt")
        tokens = owner(alone["pixel_values"], grid_thw=alone["image_grid_thw"], modality=modality).pooler_output
        expected = torch.nn.functional.normalize(tokens.mean(dim=0), dim=-1)
        torch.testing.assert_close(embeds[row], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"same number of patches in each image, got \[16, 32, 48\]"):
        owner._embed(pixel_values, "gen", token_layer=-2, image_grid_thw=grid)


PADDING = {
    "gemma4": (
        t.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2),
        {"image_position_ids": "pixel_position_ids"},
    ),
    "mistral3": (
        t.PixtralImageProcessorPil(size={"longest_edge": 16}, patch_size={"height": 4, "width": 4}),
        {"image_sizes": "image_sizes"},
    ),
}


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", PADDING)
def test_a_tower_of_padded_images_trains(name, layer, tmp_path):
    """An embedding is the mean of the tokens of an image alone, whatever else is in the batch."""
    torch.manual_seed(0)
    vlm = VLMS[name].build().eval()
    attach_branches(vlm)
    processor, keywords = PADDING[name]
    args = arguments(tmp_path / "out", token_weight=1.0, token_layer=layer)
    trainer = GmailTrainer(vlm, args, make_pairs(8), make_pairs(8, seed=50), processor)
    trainer.train()
    assert not vlm.tower.is_base("gen") and vlm.tower.is_base("real")
    assert trainer.evaluate()["eval_paired_cosine"] < 1
    images = [picture(seed).resize(size) for seed, size in enumerate([(16, 16), (16, 48), (32, 16)])]
    inputs = PixelValues(processor).inputs(images)
    names = ["gen", "real", "gen"]
    embeds = vlm.tower.embed_images(modality=names, **inputs)
    for row, modality in enumerate(names):
        alone = PixelValues(processor).inputs([images[row]])
        alone = {keywords.get(key, key): values for key, values in alone.items()}
        tokens = vlm.tower(**alone, modality=modality).last_hidden_state.flatten(0, -2)
        expected = torch.nn.functional.normalize(tokens.mean(dim=0), dim=-1)
        torch.testing.assert_close(embeds[row], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="same number of patches in each image"):
        vlm.tower._embed(inputs.pop("pixel_values"), "gen", token_layer=layer, **inputs)


@torch.no_grad()
def test_padding_is_not_part_of_an_embedding_without_a_head():
    """LFM2-VL has SigLIP 2's tower for any size, which its language model uses without the pooling head."""
    vlm = VLMS["lfm2_vl"].build().eval()
    attach_branches(vlm)
    inputs = VLMS["lfm2_vl"].images([0, 1, 2])
    embeds = vlm.tower.embed_images(**inputs, modality="gen")
    inputs["pixel_values"][inputs["pixel_attention_mask"] == 0] += 3
    torch.testing.assert_close(vlm.tower.embed_images(**inputs, modality="gen"), embeds)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *PADDING])
def test_the_command_aligns_the_tower_of_a_vlm(name, tmp_path):
    """`gmail-hf train --model` of a vision-language model; the branches then load onto the whole model."""
    torch.manual_seed(0)
    VLMS[name].build().save_pretrained(tmp_path / "vlm")
    processor = PADDING[name][0] if name in PADDING else packing_processor()
    processor.save_pretrained(tmp_path / "vlm")
    make_pairs(8).save_to_disk(tmp_path / "pairs")
    words = ["--model", str(tmp_path / "vlm"), "--dataset", str(tmp_path / "pairs"), "--output_dir"]
    words += [str(tmp_path / "out"), "--max_steps", "2", "--per_device_train_batch_size", "4", "--lora_rank", "2"]
    run("train", [*words, "--use_cpu", "true", "--report_to", "none", "--learning_rate", "1e-2"])
    assert not list((tmp_path / "out").rglob("language_model*"))
    again = from_vlm(tmp_path / "vlm", gmail=tmp_path / "out")
    assert again.tower.config.lora_rank == 2 and not again.tower.is_base("gen") and again.tower.is_base("real")
