"""Adapter folders: PEFT reads ours, we read PEFT's, and what does not fit changes nothing."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_clip, make_model, pixels, randomise, tokens
from transformers import CLIPModel

from gmail_hf import GmailCLIPModel, attach_branches, save_branches

TARGETS = r"vision_model\.encoder\.layers\.\d+\.\w+\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


def branch(model, name):
    return model.get_image_features(pixels(4), modality=name).pooler_output


def clip_features(clip):
    return clip.get_image_features(pixels(4)).pooler_output


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder, edit):
    weights = load_file(folder / "adapter_model.safetensors")
    edit(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# PEFT and plain transformers


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 2, "lora_alpha": 3, "lora_targets": ["fc1", "v_proj"]}], ids=str)
def test_peft_gives_the_same_branch(clip_folder, tmp_path, fields):
    model = make_model(clip_folder, trainable_modalities=["real", "gen"], **fields)
    model.save_pretrained(tmp_path)
    for name in ("gen", "real"):
        adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), tmp_path, subfolder=name).eval()
        torch.testing.assert_close(clip_features(adapted), branch(model, name), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            clip_features(adapted.merge_and_unload()), branch(model, name), atol=1e-5, rtol=1e-5
        )


def test_peft_gives_the_same_text_adapter(clip_folder, tmp_path):
    model = make_model(clip_folder, text_lora=True)
    model.save_adapters(tmp_path)
    adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), tmp_path, subfolder="text").eval()
    expected = model.get_text_features(tokens(3)).pooler_output
    torch.testing.assert_close(adapted.get_text_features(tokens(3)).pooler_output, expected, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(
        CLIPModel.from_pretrained(clip_folder).get_text_features(tokens(3)).pooler_output, expected
    )


def test_adapters_of_a_base_in_a_subfolder_name_no_base(tmp_path):
    make_clip().save_pretrained(tmp_path / "repo" / "clip")
    repo, folder = tmp_path / "repo", tmp_path / "adapters"
    model = randomise(GmailCLIPModel.from_base(repo, subfolder="clip"))
    model.save_adapters(folder)
    with pytest.raises(ValueError, match="names no base. Load the model .* with `from_base`.*`load_adapters`"):
        GmailCLIPModel.from_pretrained(folder)
    again = GmailCLIPModel.from_base(repo, subfolder="clip")
    again.load_adapters(folder)
    assert torch.equal(branch(again, "gen"), branch(model, "gen"))
    assert not torch.equal(branch(again, "gen"), branch(again, "real"))
    with pytest.raises(ValueError, match="which config.json does not name.*without `subfolder`"):
        model.save_adapters(tmp_path / "pushed", push_to_hub=True)


def test_saved_folder_is_a_plain_clip_of_the_real_branch(model, tmp_path):
    model.save_pretrained(tmp_path)
    clip, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(clip_features(clip), branch(model, "real"))
    assert not (tmp_path / "adapter_config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["gen", "real"]
    for name in ("gen", "real"):
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert [file for file in files if file != "README.md"] == ["adapter_config.json", "adapter_model.safetensors"]


def peft_folder(clip_folder, folder, modules_to_save=("visual_projection",), base=None, **config):
    """What PEFT itself writes for a CLIP that somebody trained with it."""
    clip = base or CLIPModel.from_pretrained(clip_folder)
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}
    modules = list(modules_to_save) or None
    adapted = get_peft_model(clip, LoraConfig(modules_to_save=modules, **config)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return clip_features(adapted)


@pytest.mark.parametrize("modules_to_save", [("visual_projection",), ()], ids=["projection", "lora_only"])
def test_folder_that_peft_wrote_loads_into_a_branch(clip_folder, tmp_path, modules_to_save):
    expected = peft_folder(clip_folder, tmp_path, modules_to_save)
    model = make_model(clip_folder)  # with other weights, which must all be replaced
    model.load_adapters(tmp_path, modality="gen")
    torch.testing.assert_close(branch(model, "gen"), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(branch(model, "real"), clip_features(CLIPModel.from_pretrained(clip_folder)))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha_pattern": {"fc1": 3}}, {"use_dora": True}], ids=str)
def test_what_peft_scales_otherwise_is_refused(clip_folder, tmp_path, options):
    peft_folder(clip_folder, tmp_path, **options)
    (option,) = options
    with pytest.raises(ValueError, match=option):
        make_model(clip_folder).load_adapters(tmp_path, modality="gen")


@pytest.mark.parametrize("name", ["gen", "real"])
@pytest.mark.parametrize("trainable", [["gen"], ["real", "gen"]], ids=str)
def test_to_clip(clip_folder, tmp_path, name, trainable):
    model = make_model(clip_folder, trainable_modalities=trainable, text_lora=True)
    clip = model.to_clip(name)
    assert type(clip) is CLIPModel and clip.config.model_type == "clip"
    clip.save_pretrained(tmp_path)
    reloaded, info = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "lora" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(clip_features(reloaded), branch(model, name), atol=1e-5, rtol=1e-5)
    inputs = {"input_ids": tokens(3), "pixel_values": pixels(4)}
    expected = model(**inputs, modality=name).logits_per_image
    torch.testing.assert_close(reloaded(**inputs).logits_per_image, expected, atol=1e-4, rtol=1e-5)


def test_to_clip_shares_no_memory(model):
    before = branch(model, "gen")
    with torch.no_grad():
        for parameter in model.to_clip("gen").parameters():
            parameter.zero_()
    assert torch.equal(branch(model, "gen"), before)


# Round trip


@pytest.mark.parametrize(
    "fields",
    [{}, {"trainable_modalities": ["real", "gen"], "text_lora": True}, {"lora_targets": ["k_proj"]}],
    ids=str,
)
def test_adapters_round_trip(clip_folder, tmp_path, fields):
    trained = make_model(clip_folder, **fields)
    trained.save_adapters(tmp_path)
    fresh = GmailCLIPModel.from_clip(clip_folder, **fields)
    fresh.load_adapters(tmp_path)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    assert not list(tmp_path.rglob("*.part"))


def test_one_branch_at_a_time(clip_folder, tmp_path):
    fields = {"trainable_modalities": ["real", "gen"]}
    trained = make_model(clip_folder, **fields)
    trained.save_adapters(tmp_path)
    fresh = GmailCLIPModel.from_clip(clip_folder, **fields)
    untouched = branch(fresh, "real")
    fresh.load_adapters(tmp_path, modality="gen")
    assert torch.equal(branch(fresh, "gen"), branch(trained, "gen"))
    assert torch.equal(branch(fresh, "real"), untouched)
    fresh.load_adapters(tmp_path / "real", modality="real")  # the PEFT folder itself
    assert torch.equal(branch(fresh, "real"), branch(trained, "real"))


def test_half_precision_adapters_leave_the_base_exact(clip_folder, tmp_path):
    """`real` has no adapter: its folder repeats the base, rounded, and must not replace it."""
    make_model(clip_folder).bfloat16().save_adapters(tmp_path)
    model = make_model(clip_folder)
    before = weights_of(model)
    model.load_adapters(tmp_path)
    for name, tensor in model.state_dict().items():
        is_adapter = ".adapters." in name or ".branches." in name
        assert is_adapter or torch.equal(tensor, before[name]), name
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


# What does not fit


def other_base(folder, clip_folder):
    model = randomise(GmailCLIPModel.from_clip(clip_folder))
    clip = make_clip(seed=9)
    model.load_state_dict(clip.state_dict(), strict=False)
    model.save_adapters(folder)


def truncated(folder):
    path = folder / "gen" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])


def garbled_config(folder):
    (folder / "gen" / "adapter_config.json").write_text('{"r": 4,')


def without(key):
    return lambda weights: [weights.pop(name) for name in list(weights) if key in name]


def extra(weights):
    weights["base_model.model.vision_model.encoder.layers.9.mlp.fc1.lora_A.weight"] = torch.zeros(4, 32)


def other_shape(weights):
    weights["base_model.model.visual_projection.weight"] = torch.zeros(12, 32)


DAMAGES = {
    "rank": (lambda f: edit_config(f / "gen", r=8), ValueError, "r=8.*lora_rank=8"),
    "alpha": (lambda f: edit_config(f / "gen", lora_alpha=16), ValueError, "lora_alpha=16"),
    "missing": (lambda f: edit_weights(f / "gen", without("fc2.lora_B")), ValueError, "missing.*fc2.lora_B"),
    "unexpected": (lambda f: edit_weights(f / "gen", extra), ValueError, r"unexpected.*layers\.9"),
    "shape": (lambda f: edit_weights(f / "gen", other_shape), ValueError, r"\(12, 32\).*\(24, 32\)"),
    "projection": (lambda f: edit_weights(f / "gen", without("projection")), ValueError, "missing.*visual_projection"),
    "truncated": (truncated, OSError, "gen/adapter_model.safetensors is damaged"),
    "config": (garbled_config, OSError, "gen/adapter_config.json is damaged"),
    "no_weights": (lambda f: (f / "gen" / "adapter_model.safetensors").unlink(), OSError, "adapter_model.safetensors"),
    "no_config": (lambda f: (f / "gen" / "adapter_config.json").unlink(), OSError, "gen/adapter_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_folder_that_does_not_fit_changes_nothing(clip_folder, tmp_path, damage):
    spoil, error, message = DAMAGES[damage]
    fields = {"trainable_modalities": ["real", "gen"]}
    randomise(make_model(clip_folder, **fields), seed=7).save_adapters(tmp_path)
    spoil(tmp_path)
    model = make_model(clip_folder, **fields)
    before = weights_of(model)
    with pytest.raises(error, match=message):
        model.load_adapters(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_adapter_of_another_base_is_refused(clip_folder, tmp_path):
    other_base(tmp_path, clip_folder)
    model = make_model(clip_folder)
    before = weights_of(model)
    with pytest.raises(ValueError, match="was trained on .*but this model's base is"):
        model.load_adapters(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_adapter_of_a_relative_of_the_base_is_refused(clip_folder, tmp_path):
    """A CLIP that only differs by a merged adapter: the same embeddings, other linear layers."""
    model = make_model(clip_folder)
    model.save_adapters(tmp_path / "adapters")
    model.to_clip("gen").save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match="with other weights"):
        GmailCLIPModel.from_clip(tmp_path / "merged").load_adapters(tmp_path / "adapters", modality="gen")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_fits_its_base_at_any_precision(clip_folder, tmp_path, dtype):
    make_model(clip_folder).save_adapters(tmp_path)
    GmailCLIPModel.from_clip(clip_folder, dtype=dtype).load_adapters(tmp_path)


def test_peft_adapter_that_names_another_base_is_refused(clip_folder, tmp_path):
    base = CLIPModel.from_pretrained(clip_folder)
    base.config._name_or_path = base.name_or_path = "org/other-clip"
    peft_folder(clip_folder, tmp_path, base=base)
    with pytest.raises(ValueError, match="org/other-clip"):
        make_model(clip_folder).load_adapters(tmp_path, modality="gen")


@pytest.mark.parametrize(
    ("trained", "fresh", "message"),
    [
        ({"trainable_modalities": ["real", "gen"]}, {}, "'real' in `trainable_modalities`"),
        ({"text_lora": True}, {}, "`text_lora=True`"),
    ],
    ids=["real", "text"],
)
def test_trained_adapter_without_a_place_is_refused(clip_folder, tmp_path, trained, fresh, message):
    make_model(clip_folder, **trained).save_adapters(tmp_path)
    model = make_model(clip_folder, **fresh)
    with pytest.raises(ValueError, match=message):
        model.load_adapters(tmp_path)


def test_adapters_of_branches_attached_to_a_clip_load(tmp_path):
    plain = make_clip()
    plain.save_pretrained(tmp_path / "clip")
    attach_branches(plain)
    randomise(plain.vision_model)
    save_branches(plain, tmp_path / "branches")
    model = GmailCLIPModel.from_clip(tmp_path / "clip")
    model.load_adapters(tmp_path / "branches")
    for name in ("real", "gen"):
        with plain.using(name):
            torch.testing.assert_close(branch(model, name), clip_features(plain))
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.weight.add_(1)
    with pytest.raises(ValueError, match="other weights"):
        model.load_adapters(tmp_path / "branches")


def test_missing_folder_is_named(model, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        model.load_adapters(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"(?s)no adapter 'real'|no adapter 'gen'"):
        model.load_adapters(tmp_path)


def test_a_gmail_checkpoint_is_no_base(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained"):
        GmailCLIPModel.from_clip(tmp_path)
