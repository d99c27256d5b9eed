"""What the two-branch model refuses, and that it names the thing and the remedy."""

import pytest
import torch
from tiny import pixels, tokens

from gmail_hf import GmailCLIPModel

PAIRS = {"generated_pixel_values": pixels(2), "real_pixel_values": pixels(2)}


def use_setter(model):
    model.modality = "generated"


def use_using(model):
    with model.using("generated"):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(input_ids=tokens(2), pixel_values=pixels(2), modality="generated"),
        lambda model: model.get_image_features(pixels(2), modality="generated"),
        lambda model: model.get_image_features(pixels(2), modality=["gen", "generated"]),
        lambda model: model.vision_model(pixels(2), modality="generated"),
        lambda model: model.embed_images(pixels(2), "generated"),
        lambda model: model.to_clip("generated"),
        lambda model: model.load_adapters("somewhere", modality="generated"),
        use_setter,
        use_using,
    ],
)
def test_unknown_modality_is_refused_everywhere(model, call):
    with pytest.raises(ValueError, match="Unknown modality.*generated.*real.*gen"):
        call(model)
    assert model.modality == "real"


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(input_ids=tokens(2), pixel_values=pixels(2), modalty="gen"),
        lambda model: model.get_image_features(pixels(2), modalty="gen"),
        lambda model: model.vision_model(pixels(2), modalty="gen"),
        lambda model: model.embed_images(pixels(2), modalty="gen"),
        lambda model: model(**PAIRS, generated_modalty="real"),
        lambda model: model(generated_pixel_values=pixels(2), real_pixel_values=pixels(2), image_id=torch.arange(2)),
    ],
)
def test_misspelt_keyword_is_refused(model, call):
    with pytest.raises(TypeError, match="modalty|image_id"):
        call(model)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": pixels(3), "input_ids": tokens(3), "modality": ["gen"]}, "1 branches for a batch of 3"),
        ({"pixel_values": pixels(3), "input_ids": tokens(3), "modality": ["gen"] * 4}, "4 branches.*3"),
        ({"pixel_values": pixels(3)}, "input_ids"),
        ({"pixel_values": pixels(3)[..., :8], "input_ids": tokens(3)}, r"8.*16"),
        ({}, "generated_pixel_values"),
        (
            {"generated_pixel_values": pixels(2), "real_pixel_values": pixels(3)},
            "generated_pixel_values': 2, 'real_pixel_values': 3",
        ),
        ({**PAIRS, "input_ids": tokens(1)}, "'input_ids': 1"),
        ({"generated_pixel_values": pixels(2), "pixel_values": pixels(2)}, "Pairs take no"),
        ({**PAIRS, "modality": "gen"}, "Pairs take no"),
        ({"input_ids": tokens(2), "modality": "gen"}, "Pass `input_ids` and `pixel_values`"),
        ({**PAIRS, "generated_modality": "sketch"}, "Unknown modality.*'sketch'"),
        ({"generated_pixel_values": pixels(2).byte()}, "uint8 images need `pixel_mean` and `pixel_std`"),
    ],
)
def test_contradicting_inputs_are_refused(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("modality", [5, torch.zeros(2), {"gen"}], ids=str)
def test_modality_of_another_type_is_refused(model, modality):
    with pytest.raises(TypeError, match="`modality` must be a name or a list"):
        model.get_image_features(pixels(2), modality=modality)


@pytest.mark.parametrize("field", ["lora_rnk", "trainable_modality"])
def test_misspelt_field_is_refused_before_the_checkpoint_is_read(field):
    with pytest.raises(ValueError, match=field):
        GmailCLIPModel.from_clip("no/such-clip", **{field: 2})
