"""IFCap: what it adds to the captioners' base class, which test_modeling_clipcap.py tests on ClipCap."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import make_tokenizer, picture, pixels
from tiny_captioner import CAPTIONS, make_bank, make_ifcap
from transformers import AutoModelForImageTextToText, TrainingArguments
from transformers import pipeline as make_pipeline

from gmail_hf.captioners import (
    CaptionCollator,
    CaptionTrainer,
    ClipCapProcessor,
    IFCapConfig,
    IFCapForConditionalGeneration,
    with_caption_rows,
)
from gmail_hf.training.resuming import last_checkpoint

MODALITIES = ["real", "gen", "real", "gen"]
ROWS = [0, 3, 6, 2]  # with 1, 2, 0 and 1 entities


@pytest.fixture(params=["gpt2", "llama"])
def ifcap(request, gmail_folder, text_folders):
    return make_ifcap(gmail_folder, text_folders[request.param])


@pytest.fixture
def llama_ifcap(gmail_folder, text_folders):
    return make_ifcap(gmail_folder, text_folders["llama"])


def batch(rows=ROWS, with_rows=True):
    embeds = np.random.default_rng(1).normal(size=(len(rows), 24)).astype(np.float32)
    batch = [{"image_embeds": embed, "caption": CAPTIONS[row]} for embed, row in zip(embeds, rows, strict=True)]
    return CaptionCollator(make_tokenizer())(
        [{**one, **({"caption_rows": row} if with_rows else {})} for one, row in zip(batch, rows, strict=True)]
    )


def logits_by_hand(model, embed, caption, own=None):
    """The logits at each token of a caption: prefix from the nearest captions, prompt, caption."""
    bank = model.caption_bank
    nearest = [row for row in (bank.embeds @ embed).argsort(descending=True).tolist() if row != own]
    scaled = [torch.nn.functional.normalize(values, dim=-1) * 24**0.5 for values in (embed, bank.embeds[nearest[:2]])]
    prefix = model.mapping_network(scaled[0][None], scaled[1][None])
    names = bank.entities[own] if own is not None else {name for row in nearest[:4] for name in bank.entities[row]}
    text = f"There are {', '.join(sorted(names))} in the image." if names else ""
    prompt = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([*prompt, *caption])[None]
    embeds = torch.cat([prefix, model.get_input_embeddings()(tokens)], dim=1)
    return model.text_model(inputs_embeds=embeds).logits[0, -len(caption) - 1 : -1]


@pytest.mark.parametrize("training", [True, False])
def test_loss_by_hand(ifcap, training):
    """Rows of a batch have prompts of different lengths, and one has none."""
    inputs = batch(with_rows=training)
    losses = []
    for number, (embed, row, mask) in enumerate(
        zip(inputs["image_embeds"], ROWS, inputs["attention_mask"], strict=True)
    ):
        caption = inputs["input_ids"][number][mask.bool()].tolist()
        predicted = logits_by_hand(ifcap, embed, caption, row if training else None).log_softmax(-1)
        losses += [-predicted[position, token] for position, token in enumerate(caption)]
    torch.testing.assert_close(ifcap(**inputs).loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
    summed = ifcap(**inputs, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(summed, torch.stack(losses).sum() / 50, rtol=1e-5, atol=1e-5)


def test_batch_equals_one_by_one(ifcap):
    images = pixels(4)
    lengths = {len(ifcap.caption_bank.prompt(names)) for names in prompted(ifcap, images)}
    assert len(lengths) > 1  # padding matters
    for options in ({}, {"num_beams": 3}):
        together = ifcap.generate(pixel_values=images, modality=MODALITIES, max_new_tokens=8, **options)
        for row, modality in enumerate(MODALITIES):
            alone = ifcap.generate(pixel_values=images[row : row + 1], modality=modality, max_new_tokens=8, **options)
            kept = alone.shape[1]
            assert torch.equal(together[row, :kept], alone[0]) and (together[row, kept:] == 513).all()


def prompted(model, images):
    embeds = model.vision_model(images, modality=MODALITIES).image_embeds
    bank = model.caption_bank
    return [bank.frequent_entities(rows, 0) for rows in bank.retrieve(embeds, 4).tolist()]


def test_greedy_is_the_argmax(llama_ifcap):
    embeds = batch()["image_embeds"]
    for row, written in enumerate(llama_ifcap.generate(image_embeds=embeds, max_new_tokens=5)):
        for position, token in enumerate(written.tolist()):
            caption = [*written[:position].tolist(), 0]  # the last token's own logits are not read
            assert logits_by_hand(llama_ifcap, embeds[row], caption)[-1].argmax() == token
            if token == 513:
                break


def test_text_alone_is_the_captions_embedding_with_noise(llama_ifcap):
    inputs = batch()
    del inputs["image_embeds"]
    clean = llama_ifcap.caption_bank.embeds[ROWS]
    torch.manual_seed(5)
    noisy = clean + 0.2 * torch.randn(clean.shape)
    torch.manual_seed(5)
    torch.testing.assert_close(llama_ifcap(**inputs).loss, llama_ifcap(**inputs, image_embeds=noisy).loss)
    llama_ifcap.config.noise_variance = 0.0
    torch.testing.assert_close(llama_ifcap(**inputs).loss, llama_ifcap(**inputs, image_embeds=clean).loss)
    with pytest.raises(ValueError, match="either `pixel_values` or `image_embeds`"):
        llama_ifcap(input_ids=inputs["input_ids"])


def test_cached_embeddings_equal_pixels(llama_ifcap):
    images, inputs = pixels(4), batch()
    with torch.no_grad():
        inputs["image_embeds"] = llama_ifcap.vision_model(images, modality="gen").image_embeds
    from_cache = llama_ifcap(**inputs)
    del inputs["image_embeds"]
    from_pixels = llama_ifcap(images, modality="gen", **inputs)
    torch.testing.assert_close(from_pixels.logits, from_cache.logits, rtol=1e-5, atol=1e-5)


def test_what_trains(llama_ifcap):
    llama_ifcap.train()
    llama_ifcap(**batch()).loss.backward()
    for name, parameter in llama_ifcap.named_parameters():
        assert (parameter.grad is None) == name.startswith("vision_model."), name
    assert llama_ifcap.mapping_network.retrieved_linear.weight.grad.abs().sum() > 0
    assert llama_ifcap.get_prefix_embeds(image_embeds=batch()["image_embeds"]).shape == (4, 3, 32)


def test_reloaded_equals_saved(ifcap, tmp_path, processor):
    ifcap.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is IFCapForConditionalGeneration and again.caption_bank.captions == list(CAPTIONS)
    assert torch.equal(again(**batch()).logits, ifcap(**batch()).logits)
    images = [picture(0), picture(1)]
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    written = ifcap.generate(pixel_values=pixel_values, max_new_tokens=6)
    assert torch.equal(again.generate(pixel_values=pixel_values, max_new_tokens=6), written)
    ClipCapProcessor(processor.image_processor, make_tokenizer()).save_pretrained(tmp_path)
    captioner = make_pipeline("image-text-to-text", model=str(tmp_path))
    answers = [captioner(image, text="", max_new_tokens=6)[0]["generated_text"] for image in images]
    assert answers == make_tokenizer().batch_decode(written, skip_special_tokens=True)
    (tmp_path / "caption_bank.json").unlink()
    with pytest.raises(OSError, match="caption_bank.json"):
        IFCapForConditionalGeneration.from_pretrained(tmp_path)


def test_a_bank_is_needed_and_must_fit(llama_ifcap, tmp_path):
    with pytest.raises(
        ValueError,
        match="8 captions with embeddings of dimension 23.* at least 5 captions with embeddings of dimension 24",
    ):
        llama_ifcap.set_caption_bank(make_bank(23))
    llama_ifcap.config.num_entity_captions = 8
    with pytest.raises(ValueError, match="8 captions .* at least 9 captions"):
        llama_ifcap.set_caption_bank(make_bank())
    llama_ifcap.caption_bank = None
    for call in (llama_ifcap, llama_ifcap.generate):
        with pytest.raises(ValueError, match="There is no caption bank"):
            call(pixels(4))
    with pytest.raises(ValueError, match="There is no caption bank"):
        llama_ifcap.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_retrieved": 0}, "`num_retrieved` must be at least 1"),
        ({"num_entity_captions": 0}, "`num_entity_captions` must be at least 1"),
        ({"entity_threshold": -1}, "`entity_threshold` must be at least 0"),
        ({"noise_variance": float("nan")}, "`noise_variance` must be finite"),
        ({"mapping_type": "mlp"}, "mapping_type"),
        ({"entity_treshold": 5}, r"Unknown IFCapConfig field\(s\) \['entity_treshold'\]"),
    ],
)
def test_invalid_fields(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        IFCapConfig(**fields)


def test_text_alone_resumes_only_on_the_same_captions(gmail_folder, text_folders, tmp_path):
    from datasets import Dataset

    def train(captions, max_steps, **resume):
        model = make_ifcap(gmail_folder, text_folders["llama"])
        rows = with_caption_rows(Dataset.from_dict({"caption": captions}), model.caption_bank)
        args = TrainingArguments(
            str(tmp_path), remove_unused_columns=False, save_strategy="steps", save_steps=1, report_to="none",
            use_cpu=True, max_steps=max_steps,
        )  # fmt: skip
        collator = CaptionCollator(make_tokenizer())
        CaptionTrainer(model=model, args=args, train_dataset=rows, data_collator=collator).train(**resume)

    train(list(CAPTIONS), 1)
    with pytest.raises(ValueError, match="was trained on other embeddings"):
        train([*CAPTIONS[1:], CAPTIONS[0]], 2, resume_from_checkpoint=True)
    train(list(CAPTIONS), 2, resume_from_checkpoint=True)
    again = IFCapForConditionalGeneration.from_pretrained(last_checkpoint(str(tmp_path)))
    assert again.caption_bank.captions == list(CAPTIONS)
    with pytest.raises(KeyError, match="a zebra"):
        with_caption_rows(Dataset.from_dict({"caption": ["a zebra"]}), again.caption_bank)
