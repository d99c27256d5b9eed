"""Captioners on every base: the image encoder is the trained model's, without its text encoder."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import safe_open
from tiny import make_tokenizer, picture, pixels, randomise
from tiny_captioner import CAPTIONS, make_bank, make_captioner, make_ifcap
from towers import image_inputs, make
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Config,
    Siglip2ImageProcessorPil,
    TrainingArguments,
    ViTConfig,
    pipeline,
)

from gmail_hf import ClipCapConfig, ClipCapForConditionalGeneration, from_base
from gmail_hf.captioners import CaptionCollator, CaptionTrainer, ClipCapProcessor
from gmail_hf.evaluation import load_model
from gmail_hf.evaluation.answering import write
from gmail_hf.training.resuming import last_checkpoint

SAVED = Path(__file__).with_name("checkpoints")
WITH_TEXT = ["clip", "metaclip_2", "siglip", "siglip2"]
VISION_ONLY = ["dinov2", "dinov2_with_registers", "dinov3", "vit"]
MODALITIES = ["real", "gen", "gen", "real"]
ROWS = [0, 1, 2, 3]


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory):
    """Trained models, complete and as adapters next to their bases."""
    root = tmp_path_factory.mktemp("bases")
    for name in (*WITH_TEXT, *VISION_ONLY):
        make(name).save_pretrained(root / f"{name}-base")
        model = randomise(from_base(root / f"{name}-base"))
        model.save_pretrained(root / name)
        model.save_adapters(root / f"{name}-adapters")
    return root


@pytest.fixture(params=[*WITH_TEXT, *VISION_ONLY])
def name(request):
    return request.param


def captions(count: int = 4) -> dict[str, torch.Tensor]:
    return CaptionCollator(make_tokenizer())([{"caption": caption} for caption in CAPTIONS[:count]])


def test_image_encoder_is_the_trained_models(name, base_folders, text_folders, tmp_path):
    """Embeddings of the model = pixels through the captioner; a mixed batch = one by one; reloaded = saved."""
    trained = AutoModel.from_pretrained(base_folders / name)
    model = make_captioner(base_folders / name, text_folders["llama"])
    images, texts = image_inputs(name, ROWS), captions()
    with torch.no_grad():
        from_pixels = model(**images, modality=MODALITIES, **texts)
        embeds = trained.embed_images(modality=MODALITIES, **images)
        from_cache = model(image_embeds=embeds, **texts)
        torch.testing.assert_close(from_pixels.logits, from_cache.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(from_pixels.loss, from_cache.loss)
        for row, modality in enumerate(MODALITIES):
            text = {key: values[row : row + 1] for key, values in texts.items()}
            alone = model(**image_inputs(name, [row]), modality=modality, **text).logits
            torch.testing.assert_close(from_pixels.logits[row : row + 1], alone, rtol=1e-4, atol=1e-4)
        real, gen = (model(**images, modality=modality).logits for modality in ("real", "gen"))
        assert not torch.allclose(real, gen)
        written = model.generate(**images, modality=MODALITIES, num_beams=2, max_new_tokens=6)
        again = model.generate(image_embeds=embeds, num_beams=2, max_new_tokens=6)
    assert torch.equal(written, again)

    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(reloaded) is ClipCapForConditionalGeneration
    assert type(reloaded.vision_model) is type(model.vision_model)
    assert torch.equal(reloaded(**images, modality=MODALITIES, **texts).logits, from_pixels.logits)
    assert torch.equal(reloaded.generate(**images, modality=MODALITIES, num_beams=2, max_new_tokens=6), written)
    assert not any(parameter.requires_grad for parameter in reloaded.vision_model.parameters())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        parts = ("text_projection", "logit_", "vision_model.text_model")
        assert not [key for key in file.keys() if key.startswith("vision_model.") and any(p in key for p in parts)]
    assert str(base_folders) not in (tmp_path / "config.json").read_text()
    adapters = make_captioner(base_folders / f"{name}-adapters", text_folders["llama"])
    pooled = [part.vision_model.pooled(modality=MODALITIES, **images) for part in (adapters, model)]
    torch.testing.assert_close(*pooled)


def test_the_image_encoder_stays(name, base_folders, text_folders):
    model = make_captioner(base_folders / name, text_folders["llama"]).train()
    assert model.training and not model.vision_model.training
    model(**image_inputs(name, ROWS), modality="gen", **captions()).loss.backward()
    for weight, parameter in model.named_parameters():
        assert (parameter.grad is None) == weight.startswith("vision_model."), weight
    with model.using("gen"):
        default = model.get_prefix_embeds(**image_inputs(name, ROWS))
    assert torch.equal(default, model.get_prefix_embeds(**image_inputs(name, ROWS), modality="gen"))
    with pytest.raises(ValueError, match=r"Unknown modality \['fake'\]"):
        model.generate(**image_inputs(name, ROWS), modality="fake")
    with pytest.raises(ValueError, match='take `modality="auto"`'):
        model.generate(**image_inputs(name, ROWS), modality="auto")
    with pytest.raises(ValueError, match=r"this model needs \(batch, "):
        model(image_embeds=torch.ones(2, 7))


@pytest.mark.parametrize("name", ["clipcap", "ifcap"])
def test_earlier_folders_give_the_same_numbers(name):
    """The folders in checkpoints/ were saved at 137b00d, when captioners took only a CLIP."""
    model, expected = AutoModelForImageTextToText.from_pretrained(SAVED / name), SAVED / "expected.json"
    input_ids = torch.tensor([[64, 70, 71], [80, 81, 513]])
    for modality, values in json.loads(expected.read_text())[name].items():
        logits = model(pixels(2), input_ids, modality=modality).logits[:, -3:, 60:68]
        torch.testing.assert_close(logits, torch.tensor(values["logits"]), rtol=0, atol=1e-5)
        assert model.generate(pixels(2), modality=modality, max_new_tokens=6).tolist() == values["tokens"]


@pytest.mark.parametrize("name", WITH_TEXT)
def test_ifcap_retrieves_with_any_text_encoder(name, base_folders, text_folders, tmp_path):
    trained = AutoModel.from_pretrained(base_folders / name)
    model = make_ifcap(base_folders / name, text_folders["llama"], bank=make_bank(trained.embed_dim))
    images, texts = image_inputs(name, ROWS), {**captions(), "caption_rows": torch.tensor(ROWS)}
    with torch.no_grad():
        embeds = trained.embed_images(modality="gen", **images)
        from_cache = model(image_embeds=embeds, **texts)
        from_pixels = model(**images, modality="gen", **texts)
    torch.testing.assert_close(from_pixels.logits, from_cache.logits, rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    noisy = model.caption_bank.embeds[ROWS] + 0.2 * torch.randn(4, trained.embed_dim)
    torch.manual_seed(5)
    torch.testing.assert_close(model(**texts).loss, model(**texts, image_embeds=noisy).loss)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(**images, modality="gen", **texts).logits, from_pixels.logits)


@pytest.mark.parametrize("name", VISION_ONLY)
def test_ifcap_needs_a_text_encoder(name, base_folders, text_folders):
    with pytest.raises(StrictDataclassClassValidationError, match="has no text encoder. Use ClipCap, which trains on"):
        make_ifcap(base_folders / name, text_folders["llama"])


def test_a_configuration_without_branches_is_refused(base_folders, text_folders, tmp_path):
    with pytest.raises(StrictDataclassClassValidationError, match="ViTConfig, which is not the configuration"):
        ClipCapConfig(vision_config=ViTConfig(), text_config=GPT2Config())
    with pytest.raises(ValueError, match="is of type 'siglip', which has no branches.*`gmail_hf.from_base`"):
        make_captioner(base_folders / "siglip-base", text_folders["llama"])
    (tmp_path / "config.json").write_text('{"model_type": "gmail_attached_siglip_vision_model"}')
    with pytest.raises(ValueError, match="has the branches of a vision-language model.*`gmail_hf.from_vlm`"):
        make_captioner(tmp_path, text_folders["llama"])


def test_a_captioner_with_random_weights():
    """At first the branches of the image encoder are equal."""
    vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 6}
    config = ClipCapConfig(vision_config=vision, text_config=GPT2Config(n_embd=8, n_layer=1, n_head=2))
    model = ClipCapForConditionalGeneration(config).eval()
    real, gen = (model.vision_model.pooled(pixels(2), modality) for modality in ("real", "gen"))
    assert real.shape == (2, 6) and torch.equal(real, gen)


def test_default_image_encoder_is_clips():
    config = ClipCapConfig()
    assert config.vision_config.model_type == "gmail_clip_vision_model"
    assert ClipCapConfig.from_dict(config.to_dict()).vision_config.to_dict() == config.vision_config.to_dict()


def test_pipeline_and_evaluation_pass_all_inputs_of_an_image(base_folders, text_folders, tmp_path):
    """SigLIP 2 of any size reads patches, their mask and the shapes of the images."""
    model = make_captioner(base_folders / "siglip2", text_folders["llama"])
    model.save_pretrained(tmp_path)
    image_processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    ClipCapProcessor(image_processor, make_tokenizer()).save_pretrained(tmp_path)
    images = [picture(0), picture(1).resize((40, 24))]
    inputs = image_processor(images, return_tensors="pt")
    expected = {
        modality: make_tokenizer().batch_decode(
            model.generate(**inputs, modality=modality, max_new_tokens=6), skip_special_tokens=True
        )
        for modality in ("real", "gen")
    }
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.model_input_names == list(inputs)
    captioner = pipeline("image-text-to-text", model=str(tmp_path))
    assert [captioner(image, text="", max_new_tokens=6)[0]["generated_text"] for image in images] == expected["real"]
    loaded = load_model(str(tmp_path))
    loaded.check_modality("gen")
    with pytest.raises(ValueError, match=r"has no branch 'fake'; it has \['real', 'gen'\]"):
        loaded.check_modality("fake")
    for modality, texts in expected.items():
        found = write(loaded.model, loaded.processor, [[image] for image in images], None, modality, max_new_tokens=6)
        assert found == [text.strip() for text in texts]


@pytest.mark.parametrize("name", ["siglip", "vit"])
def test_trained_on_cached_embeddings_and_resumed(name, base_folders, text_folders, tmp_path):
    trained = AutoModel.from_pretrained(base_folders / name)
    with torch.no_grad():
        embeds = trained.embed_images(modality="gen", **image_inputs(name, ROWS)).numpy()
    rows = [{"image_embeds": embed, "caption": caption} for embed, caption in zip(embeds, CAPTIONS, strict=False)]

    def train(folder, max_steps, model=None, **resume):
        args = TrainingArguments(
            str(folder), remove_unused_columns=False, save_strategy="steps", save_steps=1, report_to="none",
            use_cpu=True, max_steps=max_steps, lr_scheduler_type="constant",
        )  # fmt: skip
        model = model or make_captioner(base_folders / name, text_folders["llama"])
        collator = CaptionCollator(make_tokenizer())
        CaptionTrainer(model=model, args=args, train_dataset=rows, data_collator=collator).train(**resume)
        return AutoModelForImageTextToText.from_pretrained(last_checkpoint(str(folder)))

    whole = train(tmp_path / "whole", 2).state_dict()
    train(tmp_path / "part", 1)
    other = make_captioner(base_folders / name, text_folders["llama"])
    with torch.no_grad():
        next(weight for key, weight in other.vision_model.named_parameters() if "lora_B" in key).add_(1)
    with pytest.raises(ValueError, match="trained on the embeddings of another image encoder"):
        train(tmp_path / "part", 2, other, resume_from_checkpoint=True)
    part = train(tmp_path / "part", 2, resume_from_checkpoint=True).state_dict()
    assert all(torch.equal(weight, part[key]) for key, weight in whole.items())
    fresh = make_captioner(base_folders / name, text_folders["llama"]).state_dict()
    changed = {key.split(".")[0] for key, weight in whole.items() if not torch.equal(weight, fresh[key])}
    assert changed == {"mapping_network", "text_model"}


def test_a_model_without_its_text_encoder(base_folders):
    model, images = AutoModel.from_pretrained(base_folders / "siglip"), image_inputs("siglip", ROWS)
    expected = model.embed_images(modality=MODALITIES, **images)
    assert model.remove_text_encoder() is model
    assert torch.equal(model.embed_images(modality=MODALITIES, **images), expected)
    assert {key.split(".")[0] for key in model.state_dict()} == {"vision_model"}
    with pytest.raises(ValueError, match="has no text encoder"):
        model.add_text_lora()
    vit = AutoModel.from_pretrained(base_folders / "vit")
    assert vit.remove_text_encoder().state_dict().keys() == vit.state_dict().keys()
