"""`modality="auto"` on every base: equal to the modalities that the detector names, with no pass too many."""

from unittest import mock

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from test_bases import BASES, images
from tiny import pixels, randomise, tokens
from towers import make
from transformers import AutoModel

from gmail_hf import GmailConfig, attach_branches, from_base
from gmail_hf.branches.detector import DETECTOR_FILE, Detector
from gmail_hf.branches.tower import BranchedTower
from gmail_hf.models.attached import attached_tower

NAMES = ["gen", "real", "gen", "real"]


@torch.no_grad()
def with_detector(model, pixel_values, others, names=NAMES):
    """A detector whose probabilities are 0.9 for `gen` in `names` and 0.2 for `real`."""
    features = model.get_image_features(pixel_values, modality="real", **others).pooler_output
    unit = torch.nn.functional.normalize(features, dim=-1).double()
    logits = torch.tensor([0.9 if name == "gen" else 0.2 for name in names]).logit().double()
    model.detector = Detector(torch.linalg.lstsq(unit, logits + 1).solution.float(), torch.tensor(-1.0))
    return model


@pytest.fixture(params=["clip", "siglip2", "vit"])
def name(request):
    return request.param


@pytest.fixture
def case(name, tmp_path):
    """A model with trained branches and a detector, its images, and what else it takes with them."""
    make(name).save_pretrained(tmp_path / "base")
    pixel_values, others = images(name)
    return with_detector(randomise(from_base(tmp_path / "base").eval()), pixel_values, others), pixel_values, others


def features(model, pixel_values, others, **options):
    with torch.no_grad():
        return model.get_image_features(pixel_values, **others, **options)


@pytest.mark.parametrize("name", BASES)
def test_auto_equals_the_modalities_that_it_names(case):
    model, pixel_values, others = case
    auto = features(model, pixel_values, others, modality="auto", output_hidden_states=True)
    assert auto.modality == NAMES
    torch.testing.assert_close(auto.generated_probability, torch.tensor([0.9, 0.2, 0.9, 0.2]), atol=1e-4, rtol=0)
    explicit = features(model, pixel_values, others, modality=auto.modality, output_hidden_states=True)
    assert auto.keys() - explicit.keys() == {"modality", "generated_probability"} and explicit.keys() <= auto.keys()
    torch.testing.assert_close(auto.pooler_output, explicit.pooler_output, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(auto.last_hidden_state, explicit.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(auto.hidden_states, explicit.hidden_states, atol=1e-5, rtol=1e-5)
    real = features(model, pixel_values, others, modality="real").pooler_output
    assert torch.equal(auto.pooler_output[1::2], real[1::2]) and not torch.allclose(auto.pooler_output, real)
    with torch.no_grad():
        embeds = model.embed_images(pixel_values, "auto", **others)
        in_parts = model.embed_images(pixel_values, "auto", mini_batch_size=3, **others)
    unit = torch.nn.functional.normalize(explicit.pooler_output, dim=-1)
    torch.testing.assert_close(embeds, unit, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(in_parts, unit, atol=1e-6, rtol=1e-6)
    assert model.detect_modality(pixel_values, **others).modality == NAMES


@pytest.mark.parametrize(
    ("threshold", "passes", "chosen"),
    [(0.5, [4, 2], NAMES), (0.95, [4], ["real"] * 4), (0.1, [4, 4], ["gen"] * 4)],
)
def test_only_images_taken_for_generated_pass_twice(case, threshold, passes, chosen):
    model, pixel_values, others = case
    batches, forward = [], BranchedTower.route

    def counted(tower, modality, images, *grid):
        if modality is not None:  # None: inside the pass
            batches.append((modality, len(images)))
        return forward(tower, modality, images, *grid)

    with mock.patch.object(BranchedTower, "route", counted):
        auto = features(model, pixel_values, others, modality="auto", threshold=threshold)
    assert batches == list(zip(["real", "gen"], passes, strict=False)) and auto.modality == chosen


def test_the_detector_is_saved_with_whole_models_and_adapters(case, tmp_path):
    model, pixel_values, others = case
    expected = features(model, pixel_values, others, modality="auto")
    model.save_pretrained(tmp_path / "whole")
    model.save_adapters(tmp_path / "adapters")
    for folder in ("whole", "adapters"):
        again = AutoModel.from_pretrained(tmp_path / folder)
        found = features(again, pixel_values, others, modality="auto")
        assert torch.equal(found.pooler_output, expected.pooler_output) and found.modality == NAMES
        assert torch.equal(found.generated_probability, expected.generated_probability)
    other = from_base(tmp_path / "base")
    other.load_adapters(tmp_path / "whole", modality="gen")
    assert other.detector is None
    other.save_adapters(tmp_path / "adapters")
    assert AutoModel.from_pretrained(tmp_path / "adapters").detector is None


def test_without_a_detector_and_in_training_it_is_refused(case):
    model, pixel_values, others = case
    calls = [
        lambda: model.get_image_features(pixel_values, modality="auto", **others),
        lambda: model.embed_images(pixel_values, "auto", **others),
        lambda: model.detect_modality(pixel_values, **others),
    ]
    for call in calls:
        model.train()
        with pytest.raises(ValueError, match=r"`model.eval\(\)`"):
            call()
        model.eval()
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"probability in \[0, 1\]"):
            model.detect_modality(pixel_values, threshold, **others)
    with pytest.raises(TypeError, match="'threshold'"):
        model.get_image_features(pixel_values, modality="gen", threshold=0.5, **others)
    model.detector = None
    for call in calls:
        with pytest.raises(ValueError, match="none was fitted: call `gmail_hf.fit_detector"):
            call()


def test_elsewhere_auto_is_refused_with_the_remedy(model):
    with_detector(model, pixels(4), {})
    message = "pass the list of names that its `detect_modality` returns"
    with pytest.raises(ValueError, match=message):
        model(tokens(4), pixels(4), modality="auto")
    with pytest.raises(ValueError, match=message):
        model.get_image_features(pixels(2), modality=["auto", "real"])
    with pytest.raises(ValueError, match=message), model.using("auto"):
        pass
    detected = model.detect_modality(pixels(4))
    assert torch.equal(
        model(tokens(4), pixels(4), modality=detected.modality).logits_per_image,
        model(tokens(4), pixels(4), modality=NAMES).logits_per_image,
    )
    owner = make("clip")
    attach_branches(owner)
    with pytest.raises(ValueError, match=message):
        attached_tower(owner).get_image_features(pixels(2), modality="auto")
    with pytest.raises(StrictDataclassClassValidationError, match="'auto'"):
        GmailConfig(modalities=["real", "auto"])


def test_gradients_pass_and_half_precision_decides_the_same(case):
    model, pixel_values, others = case
    model.get_image_features(pixel_values, modality="auto", **others).pooler_output.sum().backward()
    grads = {name: parameter.grad for name, parameter in model.adapter_parameters()}
    model.zero_grad()
    model.get_image_features(pixel_values, modality=NAMES, **others).pooler_output.sum().backward()
    for name, parameter in model.adapter_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        detected = model.detect_modality(pixel_values, **others)
    assert detected.modality == NAMES and detected.generated_probability.dtype == torch.float32


def test_a_file_in_the_folder_is_removed_with_the_detector(model, tmp_path):
    with_detector(model, pixels(4), {}).save_pretrained(tmp_path)
    assert (tmp_path / DETECTOR_FILE).exists()
    model.detector = None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / DETECTOR_FILE).exists()
