"""Fitting the detector: scikit-learn's own numbers, the embeddings of `real` alone, and what is refused."""

import datasets
import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny import make_model, make_pairs, pixels

from gmail_hf import attach_branches, fit_detector, pair_by_caption
from gmail_hf.models.attached import attached_tower
from gmail_hf.training import detector as module
from gmail_hf.training.detector import detector_of


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    return unit(rng.normal(0.15, 1, (1000, 8))), unit(rng.normal(0, 1, (1000, 8)))


def test_the_probability_is_scikit_learns(sets):
    generated, real = sets
    detector = detector_of(generated, real, seed=3)
    fit, calibrate, test = np.split(np.random.default_rng(3).permutation(1000), [600, 800])
    labels = {len(part): np.repeat([1, 0], len(part)) for part in (fit, test)}
    rows = {name: np.concatenate([generated[part], real[part]]) for name, part in (("fit", fit), ("test", test))}
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(rows["fit"], labels[600])
    calibrated = CalibratedClassifierCV(FrozenEstimator(probe), method="sigmoid")
    calibrated.fit(np.concatenate([generated[calibrate], real[calibrate]]), labels[200])
    expected = calibrated.predict_proba(rows["test"])[:, 1]
    found = detector(7 * torch.from_numpy(rows["test"])).numpy()  # of any length
    np.testing.assert_allclose(found, expected, atol=1e-5)
    right = (expected >= 0.5) == labels[200]
    assert detector.scores["accuracy"] == right.mean() and detector.scores["images"] == 400
    assert detector.scores["generated_accuracy"] == right[:200].mean()
    assert detector.scores["real_accuracy"] == right[200:].mean()
    assert detector.scores["brier_score"] == pytest.approx(np.mean((expected - labels[200]) ** 2), abs=1e-6)
    assert 0.55 < detector.scores["accuracy"] < 0.9 and detector.scores["expected_calibration_error"] < 0.15


def test_sets_that_a_line_separates_give_finite_weights():
    rng = np.random.default_rng(0)
    generated, real = (unit(rng.normal(mean, 0.1, (50, 4))) for mean in ([1, 0, 0, 0], [-1, 0, 0, 0]))
    detector = detector_of(generated, real)
    assert detector.weight.isfinite().all() and detector.scores["accuracy"] == 1
    assert 0 < detector(torch.from_numpy(real)).max() < 0.5 < detector(torch.from_numpy(generated)).min() < 1


@pytest.fixture
def fitted(monkeypatch):
    """The embeddings that the regression gets."""
    calls = []

    def record(generated, real, *rest):
        calls.append((generated, real))
        return detector_of(generated, real, *rest)

    monkeypatch.setattr(module, "detector_of", record)
    return calls


def test_it_is_the_same_whatever_gen_learned(clip_folder, processor, fitted):
    pairs = make_pairs(30)
    models = [make_model(clip_folder), make_model(clip_folder, lora_rank=2)]
    scores = [fit_detector(model, processor, pairs) for model in models]
    assert scores[0] == scores[1] and scores[0]["images"] == 12
    assert torch.equal(models[0].detector.weight, models[1].detector.weight)
    with torch.no_grad():
        values = processor(images=pairs["generated_image"][:], return_tensors="pt")["pixel_values"]
        expected = models[0].embed_images(values, "real").numpy()
    np.testing.assert_allclose(fitted[0][0], expected, atol=1e-6)
    assert models[0].get_image_features(pixels(2), modality="auto").modality is not None


def test_one_readable_pair_of_each_real_image_is_used(model, processor, fitted):
    pairs = make_pairs(30, bad_real=(3,), bad_generated=(5,))
    fit_detector(model, processor, datasets.concatenate_datasets([pairs, pairs]))
    assert [len(rows) for rows in fitted[0]] == [28, 28]
    fit_detector(model, processor, make_pairs(30), max_pairs=24)
    assert [len(rows) for rows in fitted[1]] == [24, 24]
    with pytest.raises(ValueError, match="Column 'generated_image', row 5"):
        fit_detector(model, processor, pairs, on_bad_image="error")


def test_a_repeated_generated_image_is_used_once(model, processor, fitted):
    generated = make_pairs(24, captions=["a cat"] * 24).select_columns(["generated_image", "caption"])
    real = make_pairs(48, captions=["a cat"] * 48).select_columns(["real_image", "caption", "image_id"])
    fit_detector(model, processor, pair_by_caption(generated, real))
    assert [len(rows) for rows in fitted[0]] == [24, 24]


def test_twenty_pairs_are_enough(model, processor):
    assert fit_detector(model, processor, make_pairs(20))["images"] == 8


def test_mistakes(model, clip_folder, processor, clip):
    pairs = make_pairs(24)
    with pytest.raises(ValueError, match=r"no column\(s\) \['generated_image'\]"):
        fit_detector(model, processor, pairs.remove_columns("generated_image"))
    with pytest.raises(ValueError, match="^19 pairs .* needs 20"):
        fit_detector(model, processor, pairs.select(range(19)))
    with pytest.raises(ValueError, match="nothing to detect"):
        fit_detector(model, processor, pairs, generated_modality="real")
    with pytest.raises(ValueError, match="Unknown modality"):
        fit_detector(model, processor, pairs, generated_modality="sketch")
    with pytest.raises(ValueError, match="this model trains that one"):
        fit_detector(make_model(clip_folder, trainable_modalities=["real", "gen"]), processor, pairs)
    attach_branches(clip)
    for vlm in (clip, attached_tower(clip)):
        with pytest.raises(TypeError, match="pass the list of modalities"):
            fit_detector(vlm, processor, pairs)
    assert model.detector is None
