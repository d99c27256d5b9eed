"""Stage 2 on CLIP's text side: the `text` adapter learns from generated images, the branches stay as they are."""

import datasets
import numpy as np
import pytest
import torch
from tiny import assert_equal, logged, make_model, make_pairs, make_processor, pair_losses, pixels, tokens, weights

from gmail_hf import GmailCLIPModel, GmailLossConfig, GmailTrainer
from gmail_hf.training import embeddings
from gmail_hf.training.preparation import EmbeddedPairs

TEXT = {"align_weight": 0.0, "gen_text_weight": 1.0}


@pytest.fixture
def aligned(clip_folder):
    """A model after stage 1, and its fresh text adapter."""
    model = make_model(clip_folder)
    model.add_text_lora()
    return model


def text_features(model):
    return model.get_text_features(
        input_ids=tokens(3), attention_mask=torch.ones(3, 8, dtype=torch.long)
    ).pooler_output


def test_fresh_text_adapter_changes_nothing_and_is_saved(clip_folder, tmp_path):
    model = make_model(clip_folder).train()
    before = text_features(model.eval()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train().add_text_lora()
    assert model.text_model.training and model.config.text_lora
    assert torch.equal(text_features(model.eval()), before[0])
    assert_equal({name: tensor for name, tensor in model.state_dict().items() if ".text." not in name}, before[1])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(".adapters.text." in name for name in trained) and not any("layer_norm" in name for name in trained)
    model.save_pretrained(tmp_path)
    assert_equal(GmailCLIPModel.from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert (tmp_path / "text" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="already has a `text` adapter"):
        model.add_text_lora()


def test_only_the_text_side_changes(train, aligned):
    images, names = pixels(4), ["real", "gen", "gen", "real"]
    embeds, text = aligned.embed_images(images, names), text_features(aligned.eval())
    before = weights_of(aligned)
    trainer = train(model=aligned, **TEXT)
    after = weights(trainer)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if ".adapters.text." in name}
    assert torch.equal(aligned.eval().embed_images(images, names), embeds)
    assert not torch.allclose(text_features(aligned), text)
    assert len(logged(trainer, "gen_text_loss")) == 4 and not logged(trainer, "align_loss")


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("losses", [TEXT, {"align_weight": 0.0, "real_text_weight": 1.0}], ids=str)
def test_cached_embeddings_train_like_fresh_ones(clip_folder, train, losses):
    runs = {}
    for cache in (True, False):
        model = make_model(clip_folder, trainable_modalities=["real", "gen"])
        model.add_text_lora()
        runs[cache] = train(model=model, cache_real_embeds=cache, **losses)
    row = runs[True].train_dataset[0]
    assert not [column for column in row if column.endswith("_image")]  # nothing left to decode
    assert isinstance(runs[True].train_dataset, EmbeddedPairs)
    assert logged(runs[True]) == pytest.approx(logged(runs[False]), rel=1e-4)
    torch.testing.assert_close(weights(runs[True]), weights(runs[False]), rtol=1e-3, atol=1e-3)


def test_needs_no_real_images(train, clip_folder):
    generated = make_pairs(20).remove_columns("real_image")
    runs = []
    for pairs in (generated, make_pairs(20)):
        model = make_model(clip_folder)
        model.add_text_lora()
        runs.append(train(pairs, model=model, **TEXT))
    assert_equal(weights(runs[0]), weights(runs[1]))
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['real_image'\]"):
        train(generated)


def test_generated_taken_for_real_is_training_on_them_as_real(train, clip_folder):
    """The baseline of the paper, "mixing": generated images through the real branch."""
    swapped = make_pairs(20).remove_columns("real_image").rename_column("generated_image", "real_image")
    runs = []
    for pairs, losses in (
        (make_pairs(20), {**TEXT, "generated_modality": "real"}),
        (swapped, {"align_weight": 0.0, "real_text_weight": 1.0}),
    ):
        model = make_model(clip_folder)
        model.add_text_lora()
        runs.append(train(pairs, model=model, **losses))
    assert_equal(weights(runs[0]), weights(runs[1]))
    with pytest.raises(ValueError, match="Unknown modality.*'sketch'"):
        train(generated_modality="sketch")


def test_a_stream_without_features_needs_no_photographs(train, aligned):
    pairs = make_pairs(8)
    rows = [{**row, "real_image": None} for row in pairs]
    stream = datasets.Dataset.from_list(rows, features=pairs.features).to_iterable_dataset().map(lambda row: row)
    assert stream.column_names is None and train(stream, model=aligned, max_steps=2, **TEXT).skipped_pairs == 0


def test_evaluation_scores_real_images_against_captions(aligned, arguments):
    pairs = make_pairs(12)
    trainer = GmailTrainer(aligned, arguments(**TEXT), pairs, pairs, make_processor())
    metrics = trainer.evaluate()
    real = embeddings.embed_images(aligned, make_processor(), pairs["real_image"], "real")
    inputs = make_processor().tokenizer(pairs["caption"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        similarity = real @ aligned.embed_text(**inputs).numpy().T
    assert metrics["eval_image_to_text_R@1"] == pytest.approx((similarity.argmax(1) == np.arange(12)).mean())
    assert metrics["eval_text_to_image_R@1"] == pytest.approx((similarity.argmax(0) == np.arange(12)).mean())
    assert "eval_paired_cosine" in metrics
    without_real = trainer.evaluate(pairs.remove_columns("real_image"))
    assert without_real["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
    assert "eval_image_to_text_R@1" not in without_real


def test_joint_training_is_the_weighted_sum(clip_folder):
    model = make_model(clip_folder, text_lora=True)
    batch = {
        "generated_pixel_values": pixels(4),
        "real_pixel_values": pixels(4, seed=1),
        "input_ids": tokens(4),
        "image_ids": torch.arange(4),
    }
    gradients = []
    for losses in ({}, TEXT, {"gen_text_weight": 0.3}):
        model.zero_grad()
        pair_losses(model, batch, GmailLossConfig(**losses))[1]["loss"].backward()
        gradients.append({name: 0 if p.grad is None else p.grad.clone() for name, p in model.adapter_parameters()})
    align, text, joint = gradients
    for name, gradient in joint.items():
        torch.testing.assert_close(gradient, align[name] + 0.3 * text[name], atol=1e-6, rtol=1e-4)


def test_branch_that_was_never_aligned_is_told(clip_folder, train):
    fresh = GmailCLIPModel.from_clip(clip_folder, text_lora=True)
    assert fresh.is_base("gen") and fresh.is_base("real") and not make_model(clip_folder).is_base("gen")
    with pytest.raises(ValueError, match="`gen` branch still equals the pretrained model.*stage 1"):
        train(model=fresh, **TEXT)
    train(model=fresh, generated_modality="real", max_steps=1, **TEXT)
    joint = GmailCLIPModel.from_clip(clip_folder, text_lora=True)
    train(model=joint, gen_text_weight=1.0, max_steps=1)


def test_frozen_branches_draw_no_dropout(clip_folder, train):
    runs = []
    for cache in (True, False):
        model = make_model(clip_folder, lora_dropout=0.5)
        model.add_text_lora()
        runs.append(train(model=model, cache_real_embeds=cache, **TEXT))
    assert runs[0].model.text_model.training and not runs[0].model.vision_model.training
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), rel=1e-4)
