import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import base_dtypes, make_tokenizer, pixels
from tiny_captioner import make_captioner
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, CLIPModel, GenerationConfig, T5Config

from gmail_hf import GmailCLIPModel, GmailVisionModelWithProjection
from gmail_hf.captioners import CaptionCollator, ClipCapConfig, ClipCapForConditionalGeneration

MODALITIES = ["real", "gen", "real", "gen"]
DIM = 24


def batch(captions=("a cat", "two", "a red car", "dog"), seed=0) -> dict[str, torch.Tensor]:
    embeds = torch.randn(len(captions), DIM, generator=torch.Generator().manual_seed(seed)).numpy()
    rows = [{"image_embeds": embed, "caption": caption} for embed, caption in zip(embeds, captions, strict=True)]
    return CaptionCollator(make_tokenizer())(rows)


def test_parts_are_the_pretrained_ones(captioner, gmail_folder, text_folders):
    vision = GmailVisionModelWithProjection.from_pretrained(gmail_folder).state_dict()
    assert all(torch.equal(weight, vision[name]) for name, weight in captioner.vision_model.state_dict().items())
    text = AutoModelForCausalLM.from_pretrained(text_folders[captioner.config.text_config.model_type]).state_dict()
    assert all(torch.equal(weight, text[name]) for name, weight in captioner.text_model.state_dict().items())


def test_reloaded_equals_saved(captioner, tmp_path):
    inputs = {"pixel_values": pixels(4), "modality": MODALITIES}
    tokens = batch()["input_ids"]
    captioner.save_pretrained(tmp_path)
    reloaded = ClipCapForConditionalGeneration.from_pretrained(tmp_path)
    assert not reloaded.training
    assert torch.equal(reloaded(**inputs, input_ids=tokens).logits, captioner(**inputs, input_ids=tokens).logits)
    written = captioner.generate(**inputs, num_beams=3, max_new_tokens=12)
    assert torch.equal(reloaded.generate(**inputs, num_beams=3, max_new_tokens=12), written)
    assert reloaded.generation_config.to_dict() == captioner.generation_config.to_dict()
    assert not any(parameter.requires_grad for parameter in reloaded.vision_model.parameters())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = [key for key in file.keys() if "wte" in key or "lm_head" in key or "embed_tokens" in key]
    tied = captioner.config.text_config.tie_word_embeddings
    assert len(stored) == (1 if tied else 2)
    same = reloaded.get_output_embeddings().weight.data_ptr() == reloaded.get_input_embeddings().weight.data_ptr()
    assert same == tied


def test_max_length_counts_the_beginnings(captioner):
    beginnings = batch()["input_ids"][:, :2]
    given = {"pixel_values": pixels(len(beginnings)), "input_ids": beginnings, "min_new_tokens": 3}
    assert captioner.generate(**given, max_length=5).shape[1] == 5
    assert captioner.generate(**given, generation_config=GenerationConfig(max_length=5)).shape[1] == 5
    assert captioner.generate(**given, max_new_tokens=4, max_length=5).shape[1] == 6


def test_loss_by_hand(captioner):
    inputs = batch()
    outputs = captioner(**inputs)
    losses = []
    for row, mask in enumerate(inputs["attention_mask"]):
        ids = inputs["input_ids"][row][mask.bool()]
        assert ids[-1] == 513 and 513 not in ids[:-1]  # the end-of-text token counts, its copies as padding do not
        for position, token in enumerate(ids):
            predicted = outputs.logits[row, captioner.config.prefix_length - 1 + position].log_softmax(-1)
            losses.append(-predicted[token])
    torch.testing.assert_close(outputs.loss, torch.stack(losses).mean())
    assert outputs.logits.shape == (4, 3 + inputs["input_ids"].shape[1], 514)
    # What the Trainer passes for accumulated batches: the number of label tokens of all of them.
    summed = captioner(**inputs, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(summed, torch.stack(losses).sum() / 100)


def test_prefix_stands_before_the_caption(captioner):
    """The language model reads the mapped unit embedding, then the caption."""
    inputs = batch()
    units = F.normalize(inputs["image_embeds"], dim=-1) * DIM**0.5
    prefix = captioner.mapping_network(units)
    tokens = captioner.text_model.get_input_embeddings()(inputs["input_ids"])
    mask = torch.cat([torch.ones(4, 3, dtype=torch.long), inputs["attention_mask"]], dim=1)
    expected = captioner.text_model(inputs_embeds=torch.cat([prefix, tokens], dim=1), attention_mask=mask).logits
    torch.testing.assert_close(captioner(**inputs).logits, expected)
    doubled = {**inputs, "image_embeds": 2 * inputs["image_embeds"]}  # only directions matter
    torch.testing.assert_close(captioner(**doubled).logits, expected)


def test_cached_embeddings_equal_pixels(captioner, gmail_folder):
    gmail, images = GmailCLIPModel.from_pretrained(gmail_folder), pixels(4)
    inputs = batch()
    with torch.no_grad():
        inputs["image_embeds"] = gmail.embed_images(images, MODALITIES)
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    from_pixels = captioner(pixel_values=images, modality=MODALITIES, **tokens)
    from_cache = captioner(**inputs)
    torch.testing.assert_close(from_pixels.logits, from_cache.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_pixels.loss, from_cache.loss)
    written = captioner.generate(pixel_values=images, modality=MODALITIES, max_new_tokens=10)
    assert torch.equal(captioner.generate(image_embeds=inputs["image_embeds"], max_new_tokens=10), written)


def test_mixed_batch_equals_one_by_one(captioner):
    images, tokens = pixels(4), batch()["input_ids"]
    mixed = captioner(pixel_values=images, input_ids=tokens, modality=MODALITIES).logits
    single = [
        captioner(pixel_values=images[i : i + 1], input_ids=tokens[i : i + 1], modality=MODALITIES[i]).logits
        for i in range(4)
    ]
    torch.testing.assert_close(mixed, torch.cat(single), rtol=1e-4, atol=1e-4)
    default = captioner(pixel_values=images, input_ids=tokens).logits
    assert torch.equal(default, captioner(pixel_values=images, input_ids=tokens, modality="real").logits)
    assert not torch.allclose(default, captioner(pixel_values=images, input_ids=tokens, modality="gen").logits)


def test_default_branch(gpt2_captioner):
    images, vision = pixels(4), gpt2_captioner.vision_model

    def embed_by_vision(images, modality=None):
        return vision(images, modality=modality).image_embeds

    for model, embed in ((gpt2_captioner, gpt2_captioner.get_prefix_embeds), (vision, embed_by_vision)):
        real, gen = (embed(images, modality=modality) for modality in ("real", "gen"))
        assert model.modality == "real" and torch.equal(embed(images), real) and not torch.equal(real, gen)
        with model.using("gen"):
            assert model.modality == "gen" and torch.equal(embed(images), gen)
        model.modality = "gen"
        assert torch.equal(embed(images), gen)
        model.modality = "real"
        assert torch.equal(embed(images), real)
        with pytest.raises(ValueError, match=r"Unknown modality \['fake'\]"):
            model.modality = "fake"


def test_padded_row_equals_row_alone(captioner):
    inputs = batch()
    padded = captioner(**inputs).logits
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        alone = captioner(
            image_embeds=inputs["image_embeds"][row : row + 1], input_ids=inputs["input_ids"][row : row + 1, :length]
        ).logits
        torch.testing.assert_close(padded[row : row + 1, : 3 + length], alone, rtol=1e-4, atol=1e-4)


def test_one_beam_is_greedy_and_greedy_is_the_argmax(captioner):
    embeds = batch()["image_embeds"]
    greedy = captioner.generate(image_embeds=embeds, max_new_tokens=8)
    assert torch.equal(captioner.generate(image_embeds=embeds, max_new_tokens=8, num_beams=1), greedy)
    for row, written in enumerate(greedy):
        ids = torch.empty(1, 0, dtype=torch.long)
        for token in written:
            logits = captioner(image_embeds=embeds[row : row + 1], input_ids=ids).logits[0, -1]
            assert token == logits.argmax()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
            if token == 513:
                break


def log_likelihood(captioner, embeds, tokens):
    logits = captioner(image_embeds=embeds, input_ids=tokens).logits[:, 2:-1].log_softmax(-1)
    return logits.gather(2, tokens[..., None]).sum((1, 2))


def test_beam_search_finds_what_is_likelier(captioner):
    embeds = batch(seed=1)["image_embeds"]
    exact = {"image_embeds": embeds, "max_new_tokens": 3, "min_new_tokens": 3}
    greedy, beams = captioner.generate(**exact), captioner.generate(**exact, num_beams=40)
    better = log_likelihood(captioner, embeds, beams) - log_likelihood(captioner, embeds, greedy)
    assert (better > -1e-4).all() and (better > 1e-3).any()
    several = captioner.generate(**exact, num_beams=40, num_return_sequences=2)
    assert torch.equal(several[::2], beams)


@pytest.mark.parametrize("side", ["left", "right"])
def test_beginnings_of_captions(captioner, side):
    """A caption that goes on from its beginning equals the one that was written anyway, at any padding."""
    embeds = batch()["image_embeds"]
    whole = captioner.generate(image_embeds=embeds, max_new_tokens=8, min_new_tokens=8)
    lengths = [0, 1, 3, 2]
    begun = torch.full((4, 3), 513)
    mask = torch.zeros_like(begun)
    for row, length in enumerate(lengths):
        cells = slice(3 - length, 3) if side == "left" else slice(0, length)
        begun[row, cells], mask[row, cells] = whole[row, :length], 1
    ended = captioner.generate(
        image_embeds=embeds, input_ids=begun, attention_mask=mask, max_new_tokens=5, min_new_tokens=5
    )
    assert torch.equal(ended[:, :3], begun)
    for row, length in enumerate(lengths):
        assert torch.equal(ended[row, 3:], whole[row, length : length + 5])
    details = captioner.generate(
        image_embeds=embeds, input_ids=begun, attention_mask=mask, max_new_tokens=5, min_new_tokens=5,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(details.sequences, ended)


def test_generation_config_is_the_language_models(gmail_folder, text_folders, tmp_path):
    text = AutoModelForCausalLM.from_pretrained(text_folders["gpt2"])
    text.generation_config.update(max_new_tokens=7, repetition_penalty=1.5, eos_token_id=[3, 4])
    text.save_pretrained(tmp_path)
    config = make_captioner(gmail_folder, tmp_path).generation_config
    assert (config.max_new_tokens, config.repetition_penalty, config.eos_token_id) == (7, 1.5, [3, 4])
    assert config.pad_token_id == 3
    assert make_captioner(gmail_folder, text_folders["gpt2"]).generation_config.max_new_tokens == 64


def test_what_a_generation_config_leaves_unset_is_the_models_own(gpt2_captioner):
    embeds = batch()["image_embeds"]
    gpt2_captioner.generation_config.update(max_new_tokens=30, repetition_penalty=1.5, eos_token_id=None)
    written = gpt2_captioner.generate(image_embeds=embeds, generation_config=GenerationConfig(num_beams=2))
    assert torch.equal(written, gpt2_captioner.generate(image_embeds=embeds, num_beams=2)) and written.shape[1] == 30
    gpt2_captioner.generation_config.num_beams = 3
    given = GenerationConfig(num_beams=1, max_new_tokens=5)
    written = gpt2_captioner.generate(image_embeds=embeds, generation_config=given)
    assert torch.equal(written, gpt2_captioner.generate(image_embeds=embeds, num_beams=1, max_new_tokens=5))
    assert given.repetition_penalty is None  # it stays the caller's


def test_captions_stay_in_the_context(gmail_folder, text_folders):
    """GPT-2 has 96 learned positions: with a prefix of 90, a caption has 6 of them."""
    captioner = make_captioner(gmail_folder, text_folders["gpt2"], prefix_length=90)
    captioner.generation_config.eos_token_id = None  # no caption ends by itself
    assert captioner.config.max_caption_length == 6
    embeds, tokens = batch()["image_embeds"], torch.ones(4, 7, dtype=torch.long)
    written = captioner.generate(image_embeds=embeds)
    assert torch.equal(written, captioner.generate(image_embeds=embeds, max_new_tokens=6)) and written.shape[1] == 6
    assert captioner.generate(image_embeds=embeds, input_ids=tokens[:, :4]).shape[1] == 6
    assert captioner(image_embeds=embeds, input_ids=tokens[:, :6]).logits.shape[1] == 96
    for call in (captioner, captioner.generate):
        with pytest.raises(ValueError, match=r"has 7 tokens, .* has room for 6.*max_length=6"):
            call(image_embeds=embeds, input_ids=tokens)
    with pytest.raises(ValueError, match="fill the language model's context"):
        captioner.generate(image_embeds=embeds, input_ids=tokens[:, :6])
    with pytest.raises(StrictDataclassClassValidationError, match="leaves no room for a caption"):
        make_captioner(gmail_folder, text_folders["gpt2"], prefix_length=96)
    assert ClipCapConfig(text_config=BloomConfig()).max_caption_length is None


def test_a_frozen_text_model_does_not_drop_out(gpt2_captioner):
    gpt2_captioner.train()
    gpt2_captioner.freeze_text_model()
    assert gpt2_captioner.training and not gpt2_captioner.text_model.training
    assert torch.equal(gpt2_captioner(**batch()).loss, gpt2_captioner(**batch()).loss)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_frozen_stays(captioner, frozen):
    if frozen:
        captioner.freeze_text_model()
    before = {name: weight.clone() for name, weight in captioner.state_dict().items()}
    captioner.train()
    assert captioner.training and captioner.text_model.training != frozen and not captioner.vision_model.training
    trained = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    inputs = batch()
    del inputs["image_embeds"]
    captioner(pixel_values=pixels(4), modality="gen", **inputs).loss.backward()
    stays = ("vision_model.", "text_model.") if frozen else ("vision_model.",)
    for name, parameter in captioner.named_parameters():
        assert (parameter.grad is None) == name.startswith(stays), name
    optimizer.step()
    for name, weight in captioner.state_dict().items():
        # A key's bias moves all scores of a query alike, so attention gives it no gradient.
        if name.startswith(stays) or "mapping_network" in name:
            assert torch.equal(weight, before[name]) == name.startswith(stays), name
    if frozen:  # no dropout: two passes are one
        assert torch.equal(captioner(**batch()).loss, captioner(**batch()).loss)


def test_gradient_checkpointing_equals_plain(captioner):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            captioner.gradient_checkpointing_enable()
        captioner.zero_grad()
        captioner.train()
        torch.manual_seed(0)  # of dropout
        captioner(**batch()).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in captioner.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_precision_and_attention_are_passed_on(gmail_folder, text_folders):
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        gmail_folder, text_folders["llama"], dtype=torch.bfloat16, attn_implementation="eager", prefix_length=2
    )
    assert base_dtypes(model) == {torch.bfloat16}
    assert model.text_model.config._attn_implementation == model.vision_model.config._attn_implementation == "eager"
    inputs = batch()
    exact = model.float()(**inputs).loss
    torch.testing.assert_close(model.bfloat16()(**inputs).loss, exact, rtol=0.05, atol=0.05, check_dtype=False)


def test_a_saved_model_names_no_folder_of_this_machine(gpt2_captioner, gmail_folder, tmp_path):
    """`push_to_hub` of transformers uploads what is saved as it is."""
    assert gpt2_captioner.config.vision_config.name_or_path == gmail_folder.name
    gpt2_captioner.save_pretrained(tmp_path)
    assert str(gmail_folder.parent) not in (tmp_path / "config.json").read_text()


def test_parts_have_the_dtype_of_the_language_model(gmail_folder, text_folders, tmp_path):
    AutoModelForCausalLM.from_pretrained(text_folders["gpt2"], dtype=torch.bfloat16).save_pretrained(tmp_path / "text")
    captioner = make_captioner(gmail_folder, tmp_path / "text")  # the image encoder's checkpoint is float32
    captioner.save_pretrained(tmp_path / "captioner")
    reloaded = ClipCapForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    for model in (captioner, reloaded):
        assert base_dtypes(model) == {torch.bfloat16}
    assert torch.equal(reloaded(pixels(4)).logits, captioner(pixels(4)).logits)


def test_missing_weights_are_an_error(gpt2_captioner, tmp_path):
    gpt2_captioner.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["mapping_network.0.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks mapping_network.0.weight"):
        ClipCapForConditionalGeneration.from_pretrained(tmp_path)


def test_other_kinds_of_checkpoints_are_refused(gmail_folder, text_folders, clip_folder, tmp_path):
    build = ClipCapForConditionalGeneration.from_vision_text_pretrained
    with pytest.raises(ValueError, match="is of type 'clip', which has no branches.*`gmail_hf.from_base`"):
        build(clip_folder, text_folders["gpt2"])
    with pytest.raises(ValueError, match=r"Unknown ClipCapConfig field\(s\) \['prefix'\]"):
        build(gmail_folder, text_folders["gpt2"], prefix=4)
    with pytest.raises(ValueError, match="`mapping_num_heads` .5. must divide the language model's width, 32"):
        build(gmail_folder, text_folders["gpt2"], mapping_type="transformer", mapping_num_heads=5)
    for config in (BertConfig(), T5Config(), CLIPModel.from_pretrained(clip_folder).config):
        config.save_pretrained(tmp_path)
        message = f"{type(config).__name__}, which is not the configuration of a causal language model"
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            build(gmail_folder, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefix_length": 0}, "`prefix_length` must be at least 1"),
        ({"prefix_length": 2.5}, "prefix_length"),
        ({"mapping_type": "linear"}, "mapping_type"),
        ({"mapping_num_layers": 0}, "`mapping_num_layers` must be at least 1"),
        ({"mapping_typ": "mlp"}, r"Unknown ClipCapConfig field\(s\) \['mapping_typ'\]"),
    ],
)
def test_invalid_fields(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        ClipCapConfig(**fields)


def test_mistakes_are_named(gpt2_captioner):
    inputs, images = batch(), pixels(4)
    tokens = inputs["input_ids"]
    embeds = inputs["image_embeds"]
    for call in (gpt2_captioner, gpt2_captioner.generate):
        with pytest.raises(ValueError, match="either `pixel_values` or `image_embeds`"):
            call(input_ids=tokens)
        with pytest.raises(ValueError, match="either `pixel_values` or `image_embeds`"):
            call(pixel_values=images, image_embeds=embeds)
        with pytest.raises(ValueError, match=r"shape \(4, 23\); this model needs \(batch, 24\)"):
            call(image_embeds=embeds[:, 1:])
        with pytest.raises(ValueError, match="already come from a branch"):
            call(image_embeds=embeds, modality="gen")
        with pytest.raises(ValueError, match=r"Unknown modality \['fake'\]"):
            call(pixel_values=images, modality="fake")
        with pytest.raises(ValueError, match="2 branches for a batch of 4"):
            call(pixel_values=images, modality=["real", "gen"])
        with pytest.raises(ValueError, match="4 images, but 3 rows of `input_ids`"):
            call(image_embeds=embeds, input_ids=tokens[:3])
    with pytest.raises(TypeError, match="modalty"):
        gpt2_captioner(pixel_values=images, modalty="gen")
    with pytest.raises(ValueError, match="`use_cache=True` is not supported: forward.. returns no cache"):
        gpt2_captioner(**inputs, use_cache=True)
    assert torch.equal(gpt2_captioner(**inputs, use_cache=False).loss, gpt2_captioner(**inputs).loss)
    with pytest.raises(ValueError, match="modalty"):
        gpt2_captioner.generate(pixel_values=images, modalty="gen")
    with pytest.raises(ValueError, match="must be equal"):
        gpt2_captioner(image_embeds=embeds, input_ids=tokens, labels=tokens[:, 1:])
