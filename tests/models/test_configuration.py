"""Every field's range, the defaults, and what a round trip over disk keeps."""

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import clip_config
from transformers import CLIPConfig

from gmail_hf import GmailConfig, GmailVisionConfig
from gmail_hf.branches.configuration import ADAPTER_FIELDS

CONFIGS = [GmailConfig, GmailVisionConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_defaults_are_the_papers(config_class):
    config = config_class()
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)
    assert config.lora_targets is None  # every linear layer
    assert (config.modalities, config.trainable_modalities) == (["real", "gen"], ["gen"])
    assert config.default_modality == "real"
    config.modalities.append("changed")
    assert "changed" not in config_class().modalities


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    "fields",
    [
        {"lora_rank": 0},
        {"lora_rank": -4},
        {"lora_rank": 4.0},
        {"lora_rank": "4"},
        {"lora_alpha": 0},
        {"lora_alpha": -1.0},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"lora_targets": []},
        {"lora_targets": "q_proj"},
        {"modalities": []},
        {"modalities": "gen"},
        {"modalities": ["real", "gen", "real"]},
        {"modalities": ["real", "gen", "text"]},
        {"modalities": ["real", "gen", "a.b"]},
        {"modalities": ["real", "gen", "../up"]},
        {"trainable_modalities": ["generated"]},
        {"trainable_modalities": ["gen", "gen"]},
        {"default_modality": "generated"},
        {"default_modality": None},
    ],
    ids=str,
)
def test_invalid_values_are_refused(config_class, fields):
    (name,) = fields
    with pytest.raises(Exception, match=name) as refusal:
        config_class(**fields)
    assert isinstance(refusal.value, (ValueError, TypeError)) or "Validation" in type(refusal.value).__name__


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("typo", ["lora_rnk", "lora_r", "modality", "trainable_modality", "default_modalities"])
def test_misspelt_fields_are_refused(config_class, typo):
    with pytest.raises(ValueError, match=f"{typo}.*lora_rank"):
        config_class(**{typo: 4})


def test_the_branch_for_photographs_is_required():
    with pytest.raises(StrictDataclassClassValidationError, match="must contain 'real'.*photo"):
        GmailConfig(modalities=["photo", "gen"], default_modality="photo")


def test_round_trip(tmp_path):
    config = GmailConfig.from_base_config(
        clip_config(), lora_rank=3, lora_alpha=1.5, lora_dropout=0.25, lora_targets=["fc1"], text_lora=True,
        modalities=["real", "gen", "cartoon"], trainable_modalities=["cartoon", "gen"], default_modality="cartoon",
        base_model_name_or_path="org/base", base_model_revision="v1",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    reloaded = GmailConfig.from_pretrained(tmp_path)
    assert {**reloaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    vision = GmailVisionConfig.from_pretrained(tmp_path)
    for field in ADAPTER_FIELDS:
        assert getattr(config.vision_config, field) == getattr(vision, field) == getattr(config, field), field


def test_keeps_all_of_the_clip_config():
    clip = clip_config(hidden_act="gelu", layer_norm_eps=1e-3)
    config = GmailConfig.from_base_config(clip)
    assert isinstance(config, CLIPConfig) and config.model_type == "gmail_clip"
    for part in ("vision_config", "text_config"):
        ours, theirs = getattr(config, part).to_dict(), getattr(clip, part).to_dict()
        differing = {key for key in theirs if ours[key] != theirs[key]}
        assert differing <= {"model_type", "projection_dim"}, differing
    assert config.vision_config.projection_dim == clip.projection_dim  # a tower with projection reads it there
    assert (config.projection_dim, config.logit_scale_init_value) == (clip.projection_dim, clip.logit_scale_init_value)


def test_three_branches_route_by_name():
    import torch
    from tiny import pixels, randomise

    from gmail_hf import GmailCLIPModel

    fields = {"modalities": ["real", "sd2", "flux"], "trainable_modalities": ["sd2", "flux"]}
    model = randomise(GmailCLIPModel(GmailConfig.from_base_config(clip_config(), **fields))).eval()
    names = ["flux", "real", "sd2"]
    images = pixels(3)
    mixed = model.embed_images(images, names)
    single = torch.cat([model.embed_images(images[i : i + 1], name) for i, name in enumerate(names)])
    torch.testing.assert_close(mixed, single, atol=1e-6, rtol=1e-5)
