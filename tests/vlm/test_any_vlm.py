"""`modality` through `forward` and `generate` of every vision-language architecture."""

import copy
import inspect

import pytest
import torch
from tiny import make_clip
from vlms import VLMS

from gmail_hf import GmailCLIPModel, attach_branches, from_vlm, load_branches, save_branches
from gmail_hf.branches.tower import is_adapter_weight
from gmail_hf.models.vision_language import BranchedVLM

EVERY = [0, 1, 2]
NAMES = ["gen", "real", "gen"]


@torch.no_grad()
def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_adapter_weight(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def make(name):
    torch.manual_seed(0)
    model = VLMS[name].build().eval()
    for parameter in model.parameters():  # so that images decide what is written
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(params=VLMS)
def case(request):
    """A plain model, the same with trained branches, and the texts with images."""
    plain = make(request.param)
    branched = copy.deepcopy(plain)
    attach_branches(branched)
    randomise(branched)
    return plain, branched, VLMS[request.param]


@torch.no_grad()
def logits(model, vlm, rows=EVERY, **kwargs):
    """Of the words after the image, `(rows, 3, vocabulary)`."""
    return model(**vlm.inputs(rows), **kwargs).logits[:, -3:]


@torch.no_grad()
def test_each_image_takes_its_branch(case):
    plain, branched, vlm = case
    expected = logits(plain, vlm)
    for default in ({}, {"modality": "real"}, {"modality": ["real"] * 3}):
        assert torch.equal(logits(branched, vlm, **default), expected)
    gen, mixed = logits(branched, vlm, modality="gen"), logits(branched, vlm, modality=NAMES)
    assert all((gen - expected).abs().amax(dim=(1, 2)) > 1e-3)
    inner = branched.model(**vlm.inputs(EVERY), modality=NAMES).last_hidden_state
    torch.testing.assert_close(branched.lm_head(inner)[:, -3:], mixed, atol=1e-4, rtol=1e-4)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], (gen if name == "gen" else expected)[row], atol=1e-4, rtol=1e-4)
        alone = logits(branched, vlm, [row], modality=[name])
        torch.testing.assert_close(mixed[row], alone[0], atol=1e-4, rtol=1e-4)


def test_generate_takes_the_modality(case):
    """The scores of each step, mixed and one by one; without a modality those of the plain model."""
    plain, branched, vlm = case

    def scores(model, rows, **kwargs):
        settings = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(model.generate(**vlm.inputs(rows), **settings, **kwargs).logits, dim=1)

    assert torch.equal(scores(branched, EVERY), scores(plain, EVERY))
    mixed = scores(branched, EVERY, modality=NAMES)
    for row, name in enumerate(NAMES):
        alone = scores(branched, [row], modality=name)
        torch.testing.assert_close(mixed[row, 0], alone[0, 0], atol=1e-4, rtol=1e-4)
    assert (mixed[0, 0] - scores(branched, EVERY)[0, 0]).abs().max() > 1e-3


def test_beams_and_the_merged_model(case):
    plain, branched, vlm = case
    settings = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    merged = branched.to_base("gen")
    assert type(merged) is type(plain) and not isinstance(merged, BranchedVLM)
    torch.testing.assert_close(logits(merged, vlm), logits(branched, vlm, modality="gen"), atol=1e-4, rtol=1e-4)
    written = branched.generate(**vlm.inputs(EVERY), **settings, modality="gen")
    assert torch.equal(written, merged.generate(**vlm.inputs(EVERY), **settings))


def test_checkpointing_from_the_outer_model_changes_nothing(case):
    _, branched, vlm = case
    branched.train()

    def gradients():
        branched.zero_grad()
        inputs = vlm.inputs(EVERY)
        branched(**inputs, labels=inputs["input_ids"], modality=NAMES).loss.backward()
        return {name: p.grad.clone() for name, p in branched.named_parameters() if p.grad is not None}

    expected = gradients()
    assert any(is_adapter_weight(name) and grad.any() for name, grad in expected.items())
    branched.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), expected, atol=1e-5, rtol=1e-4)


def test_wrong_input_is_refused(case):
    _, branched, vlm = case
    with pytest.raises(ValueError, match=r"Unknown modality \['fake'\]"):
        logits(branched, vlm, modality="fake")
    with pytest.raises(ValueError, match="lists 2 branches"):
        logits(branched, vlm, modality=["gen", "real"])
    with pytest.raises(TypeError, match="modalty"):
        logits(branched, vlm, modalty="gen")
    with pytest.raises(ValueError, match="modalty"):
        branched.generate(**vlm.inputs(EVERY), max_new_tokens=1, modalty="gen")
    with pytest.raises(TypeError, match="modalty"):
        branched.model(**vlm.inputs(EVERY), modalty="gen")
    assert "modality" in inspect.signature(branched.forward).parameters
    assert "pixel_values" in inspect.signature(branched.forward).parameters


@pytest.mark.parametrize("name", ["smolvlm", "qwen3_vl"])
def test_branches_come_back(name, tmp_path):
    make(name).save_pretrained(tmp_path / "vlm")
    model = from_vlm(tmp_path / "vlm").eval()
    randomise(model)
    save_branches(model, tmp_path / "branches")
    again = from_vlm(tmp_path / "vlm", gmail=tmp_path / "branches").eval()
    vlm = VLMS[name]
    assert torch.equal(logits(again, vlm, modality=NAMES), logits(model, vlm, modality=NAMES))
    assert not torch.equal(logits(again, vlm, modality="gen"), logits(model, vlm, modality="real"))


@pytest.mark.parametrize("adapters_only", [False, True])
def test_a_llava_takes_the_branches_of_its_clip(tmp_path, adapters_only):
    clip = make_clip()
    clip.save_pretrained(tmp_path / "clip")
    gmail = GmailCLIPModel.from_clip(tmp_path / "clip").eval()
    randomise(gmail)
    (gmail.save_adapters if adapters_only else gmail.save_pretrained)(tmp_path / "gmail")
    llava = make("llava")
    with torch.no_grad():
        llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    load_branches(llava, tmp_path / "gmail")
    vlm = VLMS["llava"]
    images = vlm.images(EVERY)["pixel_values"]
    with torch.no_grad():
        for modality in ("real", "gen"):
            expected = gmail.vision_model(images, modality=modality).last_hidden_state
            actual = llava.model.vision_tower(images, modality=modality).last_hidden_state
            torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="other weights"):
        load_branches(make("llava"), tmp_path / "gmail")
    with pytest.raises(ValueError, match="has no branches"):
        load_branches(make("llava"), tmp_path / "clip")
