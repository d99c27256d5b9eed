"""The detector in a model's card: its own numbers, put into a card that exists, and nobody's words lost."""

import pytest
from tiny import make_pairs
from towers import make

from gmail_hf import GmailCLIPModel, fit_detector, from_base
from gmail_hf.publishing.marker import written_here


@pytest.fixture
def scores(model, processor):
    return fit_detector(model, processor, make_pairs(40))


def card(folder):
    return (folder / "README.md").read_text()


def test_a_card_has_the_scores(model, scores, tmp_path):
    model.save_adapters(tmp_path)
    text = card(tmp_path)
    assert written_here(text) and "On 16 images of pairs that it was not fitted on" in text
    for name, title in (("accuracy", "accuracy"), ("brier_score", "Brier score")):
        assert f"| {title} | {scores[name]:.3f} |\n" in text
    assert f"| expected calibration error | {scores['expected_calibration_error']:.3f} |\n" in text
    assert "**It is no forensic detector.**" in text and "prove that images are generated" in text


def test_a_card_that_exists_gets_and_loses_the_section(clip_folder, processor, tmp_path):
    model = GmailCLIPModel.from_base(clip_folder)
    model.save_pretrained(tmp_path)
    before = card(tmp_path)
    assert "forensic" not in before
    fit_detector(model, processor, make_pairs(40))
    model.save_pretrained(tmp_path)
    after = card(tmp_path)
    assert written_here(after) and after.count("## Images of unknown origin") == 1
    model.save_pretrained(tmp_path)
    assert card(tmp_path) == after
    model.detector = None
    model.save_pretrained(tmp_path)
    assert card(tmp_path) == before


def test_a_card_that_somebody_edited_stays(model, scores, tmp_path):
    detector, model.detector = model.detector, None
    model.save_pretrained(tmp_path)
    edited = card(tmp_path) + "\nMy words.\n"
    (tmp_path / "README.md").write_text(edited)
    model.detector = detector
    model.save_pretrained(tmp_path)
    assert card(tmp_path) == edited


def test_cards_of_models_without_text(processor, tmp_path):
    make("vit").save_pretrained(tmp_path / "base")
    model = from_base(tmp_path / "base").eval()
    fit_detector(model, processor, make_pairs(30))
    model.save_pretrained(tmp_path / "saved")
    assert "## Images of unknown origin" in card(tmp_path / "saved")
