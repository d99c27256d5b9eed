import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import make_model, make_pairs, make_tokenizer
from tiny_captioner import make_captioner
from transformers import TrainingArguments

from gmail_hf.captioners import (
    CaptionCollator,
    CaptionTrainer,
    caption_embeds,
    captioned_embeds,
    check_captions,
    group_references,
)
from gmail_hf.training.embeddings import cached_embeds, embed_images
from gmail_hf.training.resuming import seal

EOS = 513


def test_rows_are_captions_beside_their_embeddings(clip_folder, processor):
    pairs = make_pairs(8, bad_generated=(2, 5))
    model = make_model(clip_folder)
    rows = captioned_embeds(pairs, cached_embeds(pairs, "generated_image", model, processor, modality="gen"))
    kept = [0, 1, 3, 4, 6, 7]
    assert rows["caption"][:] == [pairs[i]["caption"] for i in kept]
    assert rows["image_id"][:] == [f"id-{i}" for i in kept]
    fresh = embed_images(model, processor, [pairs[i]["generated_image"] for i in kept], modality="gen")
    np.testing.assert_allclose(np.stack([row["image_embeds"] for row in rows]), fresh, atol=1e-6)
    np.testing.assert_array_equal(rows["image_embeds"][:], np.stack([rows[i]["image_embeds"] for i in range(6)]))
    assert rows[0]["image_embeds"].dtype == np.float32
    unreadable = make_pairs(2, bad_real=(0, 1))
    with pytest.raises(ValueError, match="None of the images"):
        captioned_embeds(unreadable, cached_embeds(unreadable, "real_image", model, processor))


@pytest.mark.parametrize("bad", [None, "", " \n", ["a cat", "a dog"], 7])
def test_captions_are_checked(bad):
    rows = [[text] for text in ("a cat", "a dog")] if isinstance(bad, list) else ["a cat"] * 1500
    rows = [7, 7] if bad == 7 else rows
    row = 0 if bad == 7 or isinstance(bad, list) else 1200  # these make a column of their own type
    rows[row] = bad
    with pytest.raises(ValueError, match=rf"Column 'texts', row {row}: .* is not a caption.*Repeat the image"):
        check_captions(Dataset.from_dict({"caption": rows}), "texts")
    check_captions(make_pairs(4))


def test_references_are_all_captions_of_an_image():
    captions, ids = ["a", "b", "c", "d", "e"], ["x", "y", "x", "z", "y"]
    assert group_references(captions, ids) == ([0, 1, 3], [["a", "c"], ["b", "e"], ["d"]])


def test_batch():
    tokenizer = make_tokenizer()
    rows = [{"image_embeds": np.full(4, i, np.float32), "caption": c} for i, c in enumerate(["a cat", "two", "a"])]
    batch = CaptionCollator(tokenizer)(rows)
    plain = tokenizer(["a cat", "two", "a"], add_special_tokens=False)["input_ids"]
    width = max(map(len, plain)) + 1
    assert batch["input_ids"].shape == (3, width)
    for row, ids in enumerate(plain):
        padding = width - len(ids) - 1
        assert batch["input_ids"][row].tolist() == ids + [EOS] + [EOS] * padding
        assert batch["attention_mask"][row].tolist() == [1] * (len(ids) + 1) + [0] * padding
        # The caption's own end counts, padding with the same token does not.
        assert batch["labels"][row].tolist() == ids + [EOS] + [-100] * padding
    assert batch["image_embeds"].dtype == torch.float32 and batch["image_embeds"][:, 0].tolist() == [0, 1, 2]
    cut = CaptionCollator(tokenizer, max_length=3)(rows)["input_ids"]
    assert cut.tolist() == [plain[0][:3], plain[1][:3], plain[2] + [EOS, EOS]]  # what is cut does not end there


def test_captions_of_embeddings(gpt2_captioner):
    embeds = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    tokenizer = make_tokenizer()
    gpt2_captioner.train()
    written = caption_embeds(gpt2_captioner, tokenizer, embeds, batch_size=2, num_beams=2, max_new_tokens=6)
    assert gpt2_captioner.training
    gpt2_captioner.eval()
    for embed, caption in zip(embeds, written, strict=True):
        tokens = gpt2_captioner.generate(image_embeds=torch.tensor(embed)[None], num_beams=2, max_new_tokens=6)
        assert caption == tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    # A process of a distributed run may have no image, and an empty column has no dimension.
    assert caption_embeds(gpt2_captioner, tokenizer, embeds_dataset(2).select([])["image_embeds"][:]) == []


def embeds_dataset(count):
    pairs = make_pairs(count)
    embeds = np.random.default_rng(0).normal(size=(count, 24)).astype(np.float32)
    return pairs.select_columns(["caption"]).add_column("image_embeds", list(embeds)).with_format(
        "numpy", columns=["image_embeds"], output_all_columns=True
    )  # fmt: skip


def trainer(captioner, output_dir, embeds=None, **fields):
    embeds = embeds or embeds_dataset(8)
    fields = {"save_strategy": "no", "report_to": "none", "use_cpu": True, **fields}
    args = TrainingArguments(str(output_dir), remove_unused_columns=False, **fields)
    collator = CaptionCollator(make_tokenizer())
    return CaptionTrainer(model=captioner, args=args, train_dataset=embeds, data_collator=collator)


def test_accumulated_batches_equal_one_big_batch(gmail_folder, text_folders, tmp_path):
    """Captions differ in length: the Trainer must weigh tokens, not batches."""
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        captioner = make_captioner(gmail_folder, text_folders["llama"])  # without dropout
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        run = trainer(captioner, tmp_path, max_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0, **settings)
        run.train()
        weights.append(captioner.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


def test_label_smoothing_is_refused(gpt2_captioner, tmp_path):
    """The Trainer would not shift the labels of this model and of a LLaVA."""
    with pytest.raises(ValueError, match="`label_smoothing_factor` cannot be used"):
        trainer(gpt2_captioner, tmp_path, label_smoothing_factor=0.1)


def test_another_encoder_is_refused_on_resume(gmail_folder, text_folders, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(make_captioner(gmail_folder, text_folders["gpt2"]), tmp_path, max_steps=1, **settings).train()
    other = make_captioner(gmail_folder, text_folders["gpt2"])
    other.vision_model.visual_projection.branches["gen"].data += 1
    with pytest.raises(ValueError, match="embeddings of another image encoder"):
        trainer(other, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("changed", [{"mapping_type": "transformer"}, {"prefix_length": 4}])
def test_other_settings_are_refused_on_resume(gmail_folder, text_folders, tmp_path, changed):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer(make_captioner(gmail_folder, text_folders["gpt2"]), tmp_path, max_steps=1, **settings).train()
    other = make_captioner(gmail_folder, text_folders["gpt2"], **changed)
    with pytest.raises(ValueError, match=f"was trained with {next(iter(changed))}=.*original settings"):
        trainer(other, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_other_embeddings_are_refused_on_resume(gmail_folder, text_folders, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    embeds = embeds_dataset(8)

    def run(embeds, max_steps, **resume):
        captioner = make_captioner(gmail_folder, text_folders["gpt2"])
        trainer(captioner, tmp_path, embeds, max_steps=max_steps, **settings).train(**resume)

    def moved(by):
        return embeds.map(lambda row: {"image_embeds": row["image_embeds"] + np.float32(by)})

    run(embeds, 1)
    for other in (moved(0.02), embeds.select([1, 0, *range(2, 8)]), embeds.select(range(7))):
        with pytest.raises(ValueError, match="was trained on other embeddings"):
            run(other, 2, resume_from_checkpoint=True)
    run(moved(1e-3), 2, resume_from_checkpoint=True)  # as other hardware would
    assert (tmp_path / "checkpoint-2").exists()
    (tmp_path / "checkpoint-2" / "image_embeds_sample.safetensors").unlink()
    seal(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="lacks image_embeds_sample.safetensors"):
        run(embeds, 3, resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("language_model", "sentence"),
    [
        ("org/gpt", "is a fine-tuned version of [org/gpt](https://huggingface.co/org/gpt) on the org/pairs dataset."),
        ("a-local-folder", "is trained on the org/pairs dataset."),
    ],
)
def test_the_card_names_the_language_model_or_nothing(gpt2_captioner, tmp_path, language_model, sentence):
    gpt2_captioner.config.text_config.name_or_path = language_model
    trainer(gpt2_captioner, tmp_path).create_model_card(dataset="org/pairs", model_name="captioner")
    card = (tmp_path / "README.md").read_text()
    assert f"This model {sentence}" in card
    assert ("base_model: org/gpt" in card) == (language_model == "org/gpt")


def test_a_card_that_a_user_wrote_is_kept(gpt2_captioner, tmp_path, monkeypatch):
    made, card = trainer(gpt2_captioner, tmp_path), tmp_path / "README.md"
    for dataset in ("org/pairs", "org/others"):  # written again until somebody edits it
        made.create_model_card(dataset=dataset, model_name="captioner")
        assert f"the {dataset} dataset" in card.read_text()
    edited = card.read_text() + "Mine.\n"
    card.write_text(edited)
    made.create_model_card(dataset="org/pairs", model_name="captioner")
    assert card.read_text() == edited
    card.unlink()
    made.hub_model_id = "org/captioner"
    monkeypatch.setattr("gmail_hf.publishing.model_cards.card_of_others", lambda *args, **options: "# On the Hub")
    made.create_model_card(dataset="org/pairs", model_name="captioner")
    assert card.read_text() == "# On the Hub"
