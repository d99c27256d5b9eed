"""GMAIL's tower inside LLaVA: real is LLaVA, gen the aligned tower; saved, exported and generated agree with it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import base_dtypes, make_clip, make_model, picture
from tiny_llava import PATCHES, inputs, make_tokenizer, rename_weights, save_llama, save_llava
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
    pipeline,
)

from gmail_hf import GmailCLIPModel, GmailVisionModel
from gmail_hf.vlm import GmailLlavaForConditionalGeneration, build_processor


@torch.no_grad()
def logits(model, batch, **kwargs):
    return model(**batch, **kwargs).logits


@torch.no_grad()
def greedy(model, batch, count: int, **kwargs) -> torch.Tensor:
    """Greedy decoding by whole forward passes, without a cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(count):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=batch["pixel_values"],
            use_cache=False,
            **kwargs,
        )
        chosen = outputs.logits[:, -1].argmax(dim=-1, keepdim=True)
        ids, mask = torch.cat([ids, chosen], dim=1), torch.cat([mask, torch.ones_like(chosen)], dim=1)
    return ids[:, -count:]


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_real_branch_is_llava_and_gen_is_not(llava, plain, llava_processor):
    batch = inputs(llava_processor)
    assert torch.equal(logits(llava, batch), logits(plain, batch))
    assert torch.equal(logits(llava, batch, modality="real"), logits(plain, batch))
    assert (logits(llava, batch, modality="gen") - logits(plain, batch)).abs().max() > 0.1


def test_gen_branch_reads_the_aligned_towers_patches(llava, llava_processor, gmail_folder):
    batch = inputs(llava_processor)
    tower = GmailVisionModel.from_pretrained(gmail_folder)
    with torch.no_grad():
        states = tower(batch["pixel_values"], modality="gen", output_hidden_states=True).hidden_states
        expected = llava.model.multi_modal_projector(states[-2][:, 1:])
        features = llava.get_image_features(batch["pixel_values"], modality="gen").pooler_output
    torch.testing.assert_close(torch.stack(list(features)), expected)


def test_mixed_batch_equals_one_by_one(llava, llava_processor):
    batch = inputs(llava_processor, images=(2, 1, 1))
    mixed = logits(llava, batch, modality=["gen", "real", "real", "gen"])
    first = 0
    for row, names in enumerate((["gen", "real"], ["real"], ["gen"])):
        alone = {
            "input_ids": batch["input_ids"][row : row + 1],
            "attention_mask": batch["attention_mask"][row : row + 1],
            "pixel_values": batch["pixel_values"][first : first + len(names)],
        }
        torch.testing.assert_close(mixed[row : row + 1], logits(llava, alone, modality=names), atol=1e-4, rtol=1e-4)
        first += len(names)


@pytest.mark.parametrize("modality", ["real", "gen", ["gen", "gen", "real"]])
def test_generate_is_greedy_decoding_with_the_modality(llava, llava_processor, modality):
    batch = inputs(llava_processor, images=(2, 1))
    expected = greedy(llava, batch, 5, modality=modality)
    llava.generation_config.eos_token_id = None
    for cache in (True, False):
        output = llava.generate(**batch, modality=modality, max_new_tokens=5, do_sample=False, use_cache=cache)
        assert torch.equal(output[:, -5:], expected)
    other = llava.generate(
        **batch, modality="gen" if modality == "real" else "real", max_new_tokens=5, do_sample=False
    )
    assert not torch.equal(other[:, -5:], expected)


def test_beams_carry_the_modality(llava, llava_processor):
    batch = inputs(llava_processor)
    names = ["gen", "real"]
    both = llava.generate(**batch, modality=names, max_new_tokens=4, num_beams=3, do_sample=False)
    for row, name in enumerate(names):
        alone = {key: values[row : row + 1] for key, values in batch.items()}
        output = llava.generate(**alone, modality=name, max_new_tokens=4, num_beams=3, do_sample=False)
        assert torch.equal(output[0], both[row, : output.shape[1]])


def test_default_modality(llava, llava_processor):
    batch = inputs(llava_processor)
    assert llava.modality == "real"
    with llava.using("gen"):
        assert torch.equal(logits(llava, batch), logits(llava, batch, modality="gen"))
    assert llava.modality == "real"
    llava.modality = "gen"
    assert torch.equal(logits(llava, batch), logits(llava, batch, modality="gen"))


def test_wrong_keywords_and_modalities(llava, llava_processor):
    batch = inputs(llava_processor)
    with pytest.raises(TypeError, match="modalty"):
        llava(**batch, modalty="gen")
    with pytest.raises(TypeError, match="modalty"):
        llava.model(**batch, modalty="gen")
    with pytest.raises(ValueError, match="modalty"):
        llava.generate(**batch, modalty="gen")
    with pytest.raises(ValueError, match="Unknown modality .'fake'"):
        llava(**batch, modality="fake")
    with pytest.raises(ValueError, match="lists 1 branches for 2 images"):
        llava(**batch, modality=["gen"])


def test_reloaded_equals_saved(llava, llava_processor, tmp_path):
    llava.save_pretrained(tmp_path)
    llava_processor.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(model) is GmailLlavaForConditionalGeneration
    assert_same_weights(model, llava)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is LlavaProcessor
    batch = inputs(processor)
    assert torch.equal(logits(model, batch, modality="gen"), logits(llava, batch, modality="gen"))
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    # The names in the file are the model's own: the Trainer resumes by them.
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(llava.state_dict())


@pytest.mark.parametrize("part", ["multi_modal_projector", "adapters", "language_model"])
def test_missing_weights_are_refused(llava, tmp_path, part):
    llava.save_pretrained(tmp_path)
    rename_weights(tmp_path, lambda name: name.replace(part, "gone"))
    with pytest.raises(ValueError, match="lacks .*(weight|lora)"):
        GmailLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_plain_llava_is_no_gmail_llava(llava_folder):
    with pytest.raises(ValueError, match="from_llava"):
        GmailLlavaForConditionalGeneration.from_pretrained(llava_folder)


def test_layout_of_transformers_4(gmail_folder, llava, plain, llava_processor, tmp_path):
    """`vision_tower.vision_model.`, `language_model.model.`, `language_model.lm_head.`, `multi_modal_projector.`"""
    save_llava(tmp_path, make_clip())

    def old(name: str) -> str:
        return re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name)

    rename_weights(tmp_path, old)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        beginnings = {".".join(name.split(".")[:2]) for name in file.keys()}
    assert beginnings == {
        "vision_tower.vision_model",
        "language_model.model",
        "language_model.lm_head",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
    }
    model = GmailLlavaForConditionalGeneration.from_llava(tmp_path, gmail=gmail_folder)
    assert_same_weights(model, llava)
    batch = inputs(llava_processor)
    assert torch.equal(logits(model, batch), logits(plain, batch))


@pytest.mark.integration
@pytest.mark.parametrize("modality", ["real", "gen"])
def test_exported_equals_ours_in_plain_transformers(llava, llava_processor, tmp_path, modality):
    batch = inputs(llava_processor, images=(2, 1))
    expected = logits(llava, batch, modality=modality)
    plain = llava.to_llava(modality)
    torch.testing.assert_close(logits(plain, batch), expected, atol=1e-5, rtol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    save_file({**batch, "expected": expected}, tmp_path / "tensors.safetensors")
    code = f"""
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
model, info = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "plain")!r}, output_loading_info=True)
assert type(model).__name__ == "LlavaForConditionalGeneration", type(model)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
batch = load_file({str(tmp_path / "tensors.safetensors")!r})
expected = batch.pop("expected")
with torch.no_grad():
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
assert not any(name.startswith("gmail_hf") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_export_leaves_the_model_alone(llava, plain, llava_processor):
    batch = inputs(llava_processor)
    before = {name: weight.clone() for name, weight in llava.state_dict().items()}
    llava.to_llava("gen")
    assert all(torch.equal(weight, before[name]) for name, weight in llava.state_dict().items())
    assert torch.equal(logits(llava.to_llava("real"), batch), logits(plain, batch))
    with pytest.raises(ValueError, match="Unknown modality"):
        llava.to_llava("fake")
    eos_token_id = llava.generation_config.eos_token_id
    llava.to_llava("gen").generation_config.eos_token_id = -1
    assert llava.generation_config.eos_token_id == eos_token_id != -1


def test_pipeline_by_path(llava, llava_processor, tmp_path):
    llava.save_pretrained(tmp_path / "model")
    llava_processor.save_pretrained(tmp_path / "model")
    picture(5).save(tmp_path / "photograph.png")
    items = [{"type": "image", "path": str(tmp_path / "photograph.png")}, {"type": "text", "text": "What?"}]
    serve = pipeline("image-text-to-text", model=str(tmp_path / "model"))
    settings = {"max_new_tokens": 6, "do_sample": False}
    said = serve(text=[{"role": "user", "content": items}], return_full_text=False, generate_kwargs=settings)
    batch = inputs(llava_processor, images=(1,), seed=5)
    output = llava.generate(**batch, modality="real", **settings)[:, batch["input_ids"].shape[1] :]
    assert said[0]["generated_text"] == llava_processor.decode(output[0], skip_special_tokens=True)


def test_only_adapters_that_reach_the_features_train(llava, llava_processor):
    batch = inputs(llava_processor)
    llava.train_vision_adapters(["gen"])
    trained = {name for name, p in llava.model.vision_tower.named_parameters() if p.requires_grad}
    llava(**batch, labels=batch["input_ids"], modality="gen").loss.backward()
    reached = {name for name, p in llava.model.vision_tower.named_parameters() if p.grad is not None}
    # Layer 1 of 2 lies behind the features of layer -2.
    assert trained == reached and {name.split(".")[2] for name in trained} == {"0"}
    assert all(".adapters.gen." in name for name in trained)
    llava.freeze_vision_tower()
    assert not any(p.requires_grad for p in llava.model.vision_tower.parameters())
    with pytest.raises(ValueError, match="'real'.* have no adapter"):
        llava.train_vision_adapters(["real"])


def test_a_frozen_tower_does_not_drop_out(clip_folder, llava_folder, llava_processor, tmp_path):
    make_model(clip_folder, lora_dropout=0.5).save_pretrained(tmp_path)
    llava = GmailLlavaForConditionalGeneration.from_llava(llava_folder, gmail=tmp_path)
    batch = inputs(llava_processor)
    expected = logits(llava, batch, modality="gen")
    llava.train()
    assert llava.model.language_model.training
    assert torch.equal(logits(llava, batch, modality="gen"), expected)
    llava.train_vision_adapters(["gen"])
    llava.train()
    assert not torch.equal(logits(llava, batch, modality="gen"), expected)


def test_last_layers_features_reach_all_adapters(llava):
    llava.config.vision_feature_layer = [0, -1]
    llava.train_vision_adapters(["gen"])
    trained = {name.split(".")[2] for name, p in llava.model.vision_tower.named_parameters() if p.requires_grad}
    assert trained == {"0", "1"}


def test_gradient_checkpointing_equals_plain(llava, llava_processor):
    batch = inputs(llava_processor)
    llava.train_vision_adapters(["gen"])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            llava.gradient_checkpointing_enable()
        llava.train().zero_grad()
        llava(**batch, labels=batch["input_ids"], modality=["gen", "real"]).loss.backward()
        grads.append({name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any(".adapters." in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_towers_that_do_not_fit(llava_folder, gmail_folder, clip_folder, tmp_path):
    def from_llava(gmail):
        return GmailLlavaForConditionalGeneration.from_llava(llava_folder, gmail=gmail)

    with pytest.raises(ValueError, match="not a GmailCLIPModel. Train one from a CLIP"):
        from_llava(clip_folder)
    with pytest.raises(ValueError, match="not a LLaVA"):
        GmailLlavaForConditionalGeneration.from_llava(clip_folder, gmail=gmail_folder)
    shapes = {"image_size": 32, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 64}
    for field, value in shapes.items():
        make_clip(**{field: value}).save_pretrained(tmp_path / "clip")
        make_model(tmp_path / "clip").save_pretrained(tmp_path / field)
        with pytest.raises(ValueError, match=rf"{field}=\d+, but the base of .*{field}={value}"):
            from_llava(tmp_path / field)
    make_clip(seed=9).save_pretrained(tmp_path / "clip")
    make_model(tmp_path / "clip").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="adapts another CLIP than the vision tower"):
        from_llava(tmp_path / "other")


def test_rounded_base_is_the_same_base(llava_folder, gmail_folder, tmp_path):
    GmailCLIPModel.from_pretrained(gmail_folder).bfloat16().save_pretrained(tmp_path)
    model = GmailLlavaForConditionalGeneration.from_llava(llava_folder, gmail=tmp_path)
    assert model.dtype == torch.float32


def test_incomplete_llava(llava_folder, gmail_folder, tmp_path):
    save_llava(tmp_path, make_clip())
    rename_weights(tmp_path, lambda name: name.replace("multi_modal_projector", "gone"))
    with pytest.raises(ValueError, match="lacks .* and 1 more"):
        GmailLlavaForConditionalGeneration.from_llava(tmp_path, gmail=gmail_folder)


def test_projector_of_another_width(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.multi_modal_projector.linear_1.weight"] = torch.zeros(32, 40)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        GmailLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_image_tokens_and_images_must_agree(llava, llava_processor):
    batch = inputs(llava_processor, images=(2,))
    assert (batch["input_ids"] == llava.config.image_token_id).sum() == 2 * PATCHES
    with pytest.raises(ValueError, match="do not match"):
        llava(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"][:1])


def test_tied_embeddings(gmail_folder, tmp_path):
    save_llama(tmp_path / "llama", make_tokenizer(), tie_word_embeddings=True)
    processor = build_processor(gmail_folder, tmp_path / "llama")
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, tmp_path / "llama", processor)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "model")
    again = GmailLlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    batch = inputs(processor)
    assert torch.equal(logits(again, batch), logits(model, batch))
    torch.testing.assert_close(
        logits(model.to_llava("gen"), batch), logits(model, batch, modality="gen"), atol=1e-5, rtol=1e-5
    )


def test_all_parts_take_the_language_models_dtype(gmail_folder, llama_folder, tmp_path):
    llama = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    llama.save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "llama")
    processor = build_processor(gmail_folder, tmp_path / "llama")
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, tmp_path / "llama", processor)
    assert base_dtypes(model) == {torch.bfloat16}
    batch = inputs(processor).to(torch.bfloat16)
    expected = logits(model, batch, modality="gen")
    said = model.generate(**batch, modality="gen", max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "model")
    again = GmailLlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert base_dtypes(again) == {torch.bfloat16}
    assert torch.equal(logits(again, batch, modality="gen"), expected)
    assert torch.equal(again.generate(**batch, modality="gen", max_new_tokens=3, do_sample=False), said)


def test_a_saved_model_names_no_folder_of_this_machine(llava, gmail_folder, llama_folder, tmp_path):
    """`push_to_hub` of transformers uploads what is saved as it is."""
    processor = build_processor(gmail_folder, llama_folder)
    fresh = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, llama_folder, processor)
    assert fresh.config.vision_config.name_or_path == Path(gmail_folder).name
    for model in (llava, fresh):
        for part in (model, processor):
            part.save_pretrained(tmp_path)
        assert not [path for path in tmp_path.iterdir() if bytes(Path(gmail_folder).parent) in path.read_bytes()]


def test_pipeline_in_batches_equals_one_by_one(gmail_folder, llama_folder, tmp_path):
    processor = build_processor(gmail_folder, llama_folder)
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail_folder, llama_folder, processor)
    model.generation_config.eos_token_id = None
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    serve = pipeline("image-text-to-text", model=str(tmp_path))
    chats = []
    for index, text in enumerate(("What?", "What is it that the image shows?")):
        items = [{"type": "image", "image": picture(index)}, {"type": "text", "text": text}]
        chats.append([{"role": "user", "content": items}])
    settings = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 5, "do_sample": False}}
    alone = [serve(text=chat, **settings)[0]["generated_text"] for chat in chats]
    together = serve(text=chats, batch_size=2, **settings)
    assert [said[0]["generated_text"] for said in together] == alone
    assert alone[0] != alone[1]


def test_files_hold_no_pickle(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    assert {path.suffix for path in Path(tmp_path).iterdir()} == {".json", ".safetensors"}
