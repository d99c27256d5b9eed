"""`modality` through `forward` and `generate` of every vision-language architecture."""

import copy
import inspect
import json
import pickle

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import make_clip
from vlms import IMAGE, VLMS

from gmail_hf import GmailCLIPModel, attach_branches, from_vlm, load_branches, save_branches
from gmail_hf.branches.tower import is_adapter_weight
from gmail_hf.models.attached import from_branches
from gmail_hf.models.vision_language import BranchedVLM
from gmail_hf.vlm import GmailLlavaConfig, GmailLlavaForConditionalGeneration, build_processor

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
    again = from_vlm(tmp_path, gmail=tmp_path / "branches", subfolder="vlm").eval()
    vlm = VLMS[name]
    assert torch.equal(logits(again, vlm, modality=NAMES), logits(model, vlm, modality=NAMES))
    assert not torch.equal(logits(again, vlm, modality="gen"), logits(model, vlm, modality="real"))
    save_branches(again, tmp_path / "saved")  # they do not name the main folder, which holds another model or none
    with pytest.raises(ValueError, match="name no model; in Python, `from_vlm` takes them as `gmail=`"):
        from_branches(tmp_path / "saved")
    with pytest.raises(ValueError, match="branches that were saved without their model.*`gmail_hf.from_vlm"):
        t.AutoModelForImageTextToText.from_pretrained(tmp_path / "branches")


def test_branches_are_read_with_the_arguments_of_downloads(monkeypatch):
    reads = []
    monkeypatch.setattr(t.PreTrainedConfig, "get_config_dict", lambda *names, **hub: (reads.append(hub) or {}, {}))
    with pytest.raises(ValueError, match="name no model"):
        from_branches("org/branches", "v1", token="secret", cache_dir="cache", subfolder="vlm", dtype="auto")
    assert reads == [{"token": "secret", "cache_dir": "cache", "revision": "v1"}]


def test_branches_of_a_clip_name_their_vlm_when_saved(tmp_path):
    clip, folder = make_clip(), tmp_path / "branches"
    clip.save_pretrained(tmp_path / "clip")
    gmail = GmailCLIPModel.from_clip(tmp_path / "clip")
    randomise(gmail)
    gmail.save_adapters(tmp_path / "gmail")
    llava = make("llava")
    llava.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    llava.save_pretrained(tmp_path / "vlm")
    model = from_vlm(tmp_path / "vlm", gmail=tmp_path / "gmail").eval()
    save_branches(model, folder)
    for file in ("config.json", "gen/adapter_config.json"):
        assert json.loads((folder / file).read_text())["base_model_name_or_path"] == str(tmp_path / "vlm")
    again, vlm = from_branches(folder).eval(), VLMS["llava"]
    assert torch.equal(logits(again, vlm, modality=NAMES), logits(model, vlm, modality=NAMES))
    load_branches(llava, tmp_path / "gmail")  # a model without a name
    assert llava.tower.config.base_model_name_or_path == str(tmp_path / "clip")


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


def test_branches_work_under_a_device_map(tmp_path):
    make("llava").save_pretrained(tmp_path / "vlm")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"}
    places |= {"model.language_model": "disk", "lm_head": "disk"}
    model = from_vlm(tmp_path / "vlm", device_map=places, offload_folder=str(tmp_path / "offload")).eval()
    plain = from_vlm(tmp_path / "vlm").eval()
    randomise(plain)
    model.model.vision_tower.load_state_dict(plain.model.vision_tower.state_dict())
    vlm = VLMS["llava"]
    for modality in ("real", "gen", NAMES):
        torch.testing.assert_close(logits(model, vlm, modality=modality), logits(plain, vlm, modality=modality))


def test_texts_without_images_have_no_name():
    model = make("smolvlm")
    attach_branches(model)
    randomise(model)
    inputs = VLMS["smolvlm"].inputs([1, 0])  # of two tiles, and of one
    inputs["pixel_values"][1] = 0
    inputs["input_ids"][1][inputs["input_ids"][1] == IMAGE] = 1
    with torch.no_grad():
        one = model(**inputs, modality=["gen"]).logits
        assert torch.equal(one, model(**inputs, modality="gen").logits)
    llava = make("llava")
    attach_branches(llava)
    adjacent = {**VLMS["llava"].inputs(EVERY)}
    adjacent["input_ids"] = torch.cat([torch.full((1, 8), IMAGE), torch.full((1, 4), IMAGE)], dim=1)
    adjacent["attention_mask"] = torch.ones_like(adjacent["input_ids"])
    with pytest.raises(ValueError, match="lists 1 branches for 3 images"):
        llava(**adjacent, modality=["gen"])


def test_what_would_lose_branches_is_refused(tmp_path):
    make("llava").save_pretrained(tmp_path / "vlm")
    model = from_vlm(tmp_path / "vlm")
    model.save_pretrained(tmp_path / "whole")
    save_branches(model, tmp_path / "branches")
    with pytest.raises(ValueError, match="load it with `AutoModelForImageTextToText` and save it again"):
        from_vlm(tmp_path / "whole", gmail=tmp_path / "branches")
    t.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    assert from_vlm(tmp_path / "again", gmail=tmp_path / "branches").lm_head.weight.equal(model.lm_head.weight)
    with pytest.raises(ValueError, match="branches' has branches and no language model: pass it as `gmail=`"):
        from_vlm(tmp_path / "branches")
    GmailLlavaConfig().save_pretrained(tmp_path / "gmail_llava")
    with pytest.raises(ValueError, match="already has branches: load it with `AutoModelForImageTextToText`"):
        from_vlm(tmp_path / "gmail_llava", gmail=tmp_path / "branches")
    for build in (
        lambda: build_processor(tmp_path / "branches", tmp_path / "llama"),
        lambda: GmailLlavaForConditionalGeneration.from_llava(tmp_path / "vlm", gmail=tmp_path / "branches"),
    ):
        with pytest.raises(ValueError, match="branches' has the branches of a vision-language model"):
            build()
    make_clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="of type 'clip', which has no language model: .* `gmail_hf.from_base`"):
        from_vlm(tmp_path / "clip")
    with pytest.raises(ValueError, match="their own settings.*lora_rank"):
        from_vlm(tmp_path / "vlm", gmail=tmp_path / "branches", lora_rank=16)
    other = VLMS["llava"].build()
    with pytest.raises(ValueError, match="other weights"):
        load_branches(other, tmp_path / "branches")
    assert not isinstance(other, BranchedVLM)  # unchanged
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Restrict `target_modules` to the language model"):
        save_branches(wrapped, tmp_path / "lost")


def test_peft_layers_are_merged_before_a_branch():
    model = make("llava")
    attach_branches(model)
    randomise(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    with pytest.raises(ValueError, match=r"Merge its adapter first, with `merge_and_unload\(\)`"):
        wrapped.to_base("gen")
    expected = logits(wrapped, VLMS["llava"], modality="gen")
    merged = wrapped.merge_and_unload().to_base("gen")
    torch.testing.assert_close(logits(merged, VLMS["llava"]), expected, atol=1e-4, rtol=1e-4)


def test_branches_on_a_model_that_peft_wraps(tmp_path):
    make("llava").save_pretrained(tmp_path / "vlm")
    load = t.AutoModelForImageTextToText.from_pretrained
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(load(tmp_path / "vlm"), lora).save_pretrained(tmp_path / "sft")
    model = PeftModel.from_pretrained(load(tmp_path / "vlm"), tmp_path / "sft").eval()
    attach_branches(model)
    randomise(model)
    save_branches(model, tmp_path / "branches")
    expected = logits(model, VLMS["llava"], modality="gen")
    gen = PeftModel.from_pretrained(load(tmp_path / "vlm"), tmp_path / "branches", subfolder="gen").merge_and_unload()
    merged = PeftModel.from_pretrained(gen, tmp_path / "sft").eval()
    torch.testing.assert_close(logits(merged, VLMS["llava"]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("labels", ["all", "none"])
def test_texts_alone_and_unlabelled_batches_train(case, labels):
    """A batch of an SFT may hold no image, and one whose images cannot be read holds no label."""
    _, branched, vlm = case
    branched.train()
    inputs = vlm.inputs(EVERY)
    if labels == "all":
        inputs = {"input_ids": torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(0))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    targets = inputs["input_ids"] if labels == "all" else torch.full_like(inputs["input_ids"], -100)
    loss = branched(**inputs, labels=targets, modality="gen").loss
    loss.backward()
    assert loss.isfinite() and (loss == 0) == (labels == "none")


def test_the_trainer_resumes(case, tmp_path):
    """Many models save with the names of transformers 4, which `Trainer` does not find on resume."""
    _, branched, vlm = case
    before = branched.state_dict()
    branched.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() <= before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in saved.items())
    assert len(before) - len(saved) <= 1  # a head with the weights of the token embeddings


def test_pickled_and_loaded(case):
    _, branched, vlm = case
    twin = pickle.loads(pickle.dumps(branched))
    assert type(twin) is type(branched)
    assert torch.equal(logits(twin, vlm, modality=NAMES), logits(branched, vlm, modality=NAMES))
