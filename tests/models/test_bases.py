"""Every base with a class here: from the plain model to a checkpoint, PEFT folders, a merged model and a card."""

import json

import pytest
import torch
from peft import PeftModel
from tiny import randomise
from towers import image_inputs, make
from transformers import AutoModel, CLIPModel

from gmail_hf import GmailCLIPModel, GmailSiglipModel, from_base

BASES = ["clip", "metaclip_2", "siglip", "siglip2", "dinov2", "dinov2_with_registers", "dinov3", "vit"]
NAMES = ["real", "gen", "gen", "real"]


@pytest.fixture(params=BASES)
def name(request):
    return request.param


@pytest.fixture
def model(name, tmp_path):
    make(name).save_pretrained(tmp_path / "base")
    return randomise(from_base(tmp_path / "base").eval())


def images(name):
    inputs = image_inputs(name, [0, 1, 2, 3])
    return inputs.pop("pixel_values"), inputs


@torch.no_grad()
def plain_embeds(plain, name):
    pixel_values, others = images(name)
    if hasattr(plain, "get_image_features"):
        features = plain.get_image_features(pixel_values, **others).pooler_output
    else:
        features = plain(pixel_values, **others).last_hidden_state[:, 0]
    return torch.nn.functional.normalize(features, dim=-1)


@torch.no_grad()
def embeds(model, name, modality):
    pixel_values, others = images(name)
    return model.embed_images(pixel_values, modality, **others)


def test_fresh_branches_are_the_base(name, tmp_path):
    base = make(name)
    base.save_pretrained(tmp_path)
    model = from_base(tmp_path)
    for modality in ("real", "gen", NAMES):
        torch.testing.assert_close(embeds(model, name, modality), plain_embeds(base, name), atol=1e-6, rtol=1e-6)
    assert model.is_base("gen") and model.is_base("real") and not model.trains("real") and model.trains("gen")


def test_checkpoints_come_back(model, name, tmp_path):
    expected = {modality: embeds(model, name, modality) for modality in ("real", "gen")}
    assert not model.is_base("gen") and not torch.allclose(expected["gen"], expected["real"], atol=1e-3)
    model.save_pretrained(tmp_path / "whole")
    model.save_adapters(tmp_path / "adapters")
    for folder in ("whole", "adapters"):
        again = AutoModel.from_pretrained(tmp_path / folder)
        assert type(again) is type(model)
        for modality in expected:
            assert torch.equal(embeds(again, name, modality), expected[modality]), (folder, modality)
    assert not list((tmp_path / "adapters").glob("*.safetensors"))


def test_the_folder_is_a_base_with_peft_adapters(model, name, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    plain = model.base_class.from_pretrained(tmp_path / "whole", **model.base_kwargs)
    torch.testing.assert_close(plain_embeds(plain, name), embeds(model, name, "real"), atol=1e-6, rtol=1e-6)
    gen = PeftModel.from_pretrained(plain, tmp_path / "whole", subfolder="gen").eval()
    torch.testing.assert_close(plain_embeds(gen.base_model.model, name), embeds(model, name, "gen"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("modality", ["real", "gen"])
def test_merged_models(model, name, modality):
    merged = model.to_base(modality)
    assert type(merged) is model.base_class
    torch.testing.assert_close(plain_embeds(merged, name), embeds(model, name, modality), atol=1e-5, rtol=0)


def test_merged_models_can_be_exported(tmp_path):
    make("siglip").save_pretrained(tmp_path)
    merged = randomise(from_base(tmp_path)).to_base("gen")
    pixel_values, _ = images("siglip")
    program = torch.export.export(merged.vision_model, (pixel_values,))
    expected = merged.vision_model(pixel_values).pooler_output
    torch.testing.assert_close(program.module()(pixel_values).pooler_output, expected, atol=1e-6, rtol=1e-6)


def test_pairs(model, name):
    pixel_values, others = images(name)
    sides = {f"{side}_{key}": value for side in ("generated", "real") for key, value in others.items()}
    model.train()
    output = model(generated_pixel_values=pixel_values, real_pixel_values=pixel_values, **sides)
    torch.testing.assert_close(output.gen_embeds, embeds(model, name, "gen"), atol=1e-6, rtol=1e-6)
    assert output.gen_embeds.requires_grad and not output.real_embeds.requires_grad
    caching = model(
        generated_pixel_values=pixel_values, **{key: sides[key] for key in sides if "gen" in key}, mini_batch_size=3
    )
    torch.testing.assert_close(caching.gen_embeds, output.gen_embeds, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="same number of rows"):
        model(generated_pixel_values=pixel_values, real_pixel_values=pixel_values[:2], **sides)
    with pytest.raises(TypeError, match="modalty"):
        model(pixel_values=pixel_values, modalty="gen", **others)
    model.eval()
    again = model(pixel_values=None, generated_pixel_values=pixel_values, real_pixel_values=pixel_values, **sides)
    assert torch.equal(again.real_embeds, output.real_embeds)
    texts = {} if not hasattr(model, "text_model") else {"input_ids": torch.ones(4, 16, dtype=torch.long)}
    model(pixel_values=pixel_values, generated_pixel_values=None, real_pixel_values=None, **texts, **others)
    if not texts:
        with pytest.raises(TypeError, match="input_ids"):
            model(generated_pixel_values=pixel_values, input_ids=torch.ones(4, 4, dtype=torch.long))


def test_patch_tokens_are_only_those_of_patches(model, name):
    pixel_values, others = images(name)
    others = {f"real_{key}": value for key, value in others.items()}
    count = 4
    if name == "siglip2":
        with pytest.raises(ValueError, match=r"same number of patches in each image, got \[4, 12, 16\]"):
            model(real_pixel_values=pixel_values, token_layer=-1, **others)
        others["real_spatial_shapes"][:] = torch.tensor([3, 4])
        others["real_pixel_attention_mask"][:] = (torch.arange(16) < 12).int()
        count = 12
    tokens = model(real_pixel_values=pixel_values, token_layer=-1, **others).real_tokens
    assert tokens.shape == (4, count, 32)


NAMES_IN_CARDS = {
    **{"clip": "CLIP", "metaclip_2": "MetaCLIP 2", "siglip": "SigLIP", "siglip2": "SigLIP 2", "vit": "ViT"},
    **{"dinov2": "DINOv2", "dinov2_with_registers": "DINOv2 with registers", "dinov3": "DINOv3"},
}


def test_cards_name_the_base(model, name, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    kind = model.base_class.__name__
    assert f"from gmail_hf import Gmail{kind}" in text and f"from transformers import {kind}" in text
    assert f"A {NAMES_IN_CARDS[name]} with two image branches" in text
    assert f"is a {NAMES_IN_CARDS[name]} with PEFT adapters" in text
    assert ("has its own projection" in text) == (name in ("clip", "metaclip_2"))
    assert ("zero-shot-image-classification" in text) == hasattr(model, "text_model")


def test_head_may_be_shared(tmp_path):
    make("siglip").save_pretrained(tmp_path)
    model = GmailSiglipModel.from_base(tmp_path, head="shared")
    assert not any(".head." in key for key, _ in model.adapter_parameters())
    model.save_adapters(tmp_path / "adapters")
    assert json.loads((tmp_path / "adapters" / "gen" / "adapter_config.json").read_text())["modules_to_save"] is None
    assert GmailSiglipModel.from_pretrained(tmp_path / "adapters").config.head == "shared"


def test_unknown_and_mistaken_bases_are_refused_by_name(tmp_path, clip_folder):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))  # and no weights
    with pytest.raises(ValueError, match="of type 'resnet', for which there is no class.*'clip', 'dinov2'"):
        from_base(tmp_path)
    with pytest.raises(ValueError, match="of type 'resnet', but GmailCLIPModel needs 'clip'"):
        GmailCLIPModel.from_base(tmp_path)
    GmailCLIPModel.from_base(clip_folder).save_pretrained(tmp_path / "has_branches")
    with pytest.raises(ValueError, match="already has branches"):
        from_base(tmp_path / "has_branches")


def test_adapters_of_a_relative_of_the_base_are_refused(clip_folder, tmp_path):
    randomise(GmailCLIPModel.from_base(clip_folder)).save_adapters(tmp_path / "adapters")
    clip = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        clip.vision_model.encoder.layers[0].layer_norm1.bias.add_(0.01)  # nothing but a bias
    clip.save_pretrained(tmp_path / "relative")
    with pytest.raises(ValueError, match="with other weights"):
        GmailCLIPModel.from_base(tmp_path / "relative").load_adapters(tmp_path / "adapters")


def test_every_public_model_is_registered():
    from gmail_hf.models.auto import MODELS
    from gmail_hf.registration import MODULES

    assert {model.config_class.model_type for model in MODELS} <= MODULES.keys()
