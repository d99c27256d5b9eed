"""Detector files from elsewhere: refused with a reason, and nothing of the model changes."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_clip, make_model, make_pairs

from gmail_hf import GmailCLIPModel, fit_detector
from gmail_hf.branches.detector import DETECTOR_FILE, SETTINGS
from gmail_hf.branches.peft_folders import SIGNATURE


@pytest.fixture(scope="module")
def saved(clip_folder, processor, tmp_path_factory):
    model = make_model(clip_folder)
    fit_detector(model, processor, make_pairs(24))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder / "whole")
    model.save_adapters(folder / "adapters")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(folder, tensors=lambda tensors: tensors, **metadata):
    for file in (folder / "whole" / DETECTOR_FILE, folder / "adapters" / DETECTOR_FILE):
        with safe_open(file, "pt") as content:
            known = content.metadata()
        values = {key: value for key, value in {**known, **metadata}.items() if value is not None}
        save_file(tensors(load_file(file)), file, values)


def weight(value, dtype=torch.float32, size=24):
    return lambda tensors: {**tensors, "weight": torch.full((size,), value).to(dtype)}


def settings(**changes):
    return {SETTINGS: json.dumps({"modality": "gen", "scores": {"accuracy": 0.5}, **changes})}


DAMAGES = {
    "nan": ((weight(float("nan")), {}), "not finite"),
    "infinite": ((weight(float("inf")), {}), "not finite"),
    "integers": ((weight(1.0, torch.int8), {}), r"weight I8 \[24\]; a detector .* float32"),
    "doubles": ((weight(1.0, torch.float64), {}), r"weight F64"),
    "dimension": ((weight(1.0, size=25), {}), r"weight F32 \[25\]; .*\[24\]"),
    "missing": ((lambda tensors: {"weight": tensors["weight"]}, {}), "a detector of this model has"),
    "unexpected": ((lambda tensors: {**tensors, "scale": torch.ones(1)}, {}), r"scale F32 \[1\]"),
    "branch": ((lambda tensors: tensors, settings(modality="sketch")), r"branch 'sketch'; this model has \['gen'\]"),
    "real": ((lambda tensors: tensors, settings(modality="real")), "branch 'real'"),
    "score": ((lambda tensors: tensors, settings(scores={"accuracy": "<script>"})), "not a branch and scores"),
    "nan_score": ((lambda tensors: tensors, settings(scores={"accuracy": float("nan")})), "not a branch and scores"),
    "no_settings": ((lambda tensors: tensors, {SETTINGS: None}), "not a branch and scores"),
    "deep": ((lambda tensors: tensors, {SETTINGS: "[" * 100_000}), "settings in .* damaged"),
    "no_signature": ((lambda tensors: tensors, {SIGNATURE: None}), "no signature of its base"),
    "other_base": ((lambda tensors: tensors, {SIGNATURE: json.dumps({"x": [0.5]})}), "with other weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_is_refused(folder, clip_folder, damage):
    (tensors, metadata), message = DAMAGES[damage]
    edit(folder, tensors, **metadata)
    for kind in ("whole", "adapters"):
        with pytest.raises(ValueError, match=message):
            GmailCLIPModel.from_pretrained(folder / kind)
    model = GmailCLIPModel.from_base(clip_folder)
    with pytest.raises(ValueError, match=message):
        model.load_adapters(folder / "adapters")
    assert model.detector is None and model.is_base("gen")


def test_a_cut_file_is_refused(folder):
    for kind in ("whole", "adapters"):
        path = folder / kind / DETECTOR_FILE
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(OSError, match=f"{DETECTOR_FILE} is damaged"):
            GmailCLIPModel.from_pretrained(folder / kind)


def test_a_detector_of_another_base_or_a_trained_real_branch_is_refused(folder, clip_folder, tmp_path):
    make_clip(seed=9).save_pretrained(tmp_path / "other")
    GmailCLIPModel.from_base(tmp_path / "other").save_pretrained(tmp_path / "without")
    make_model(clip_folder, trainable_modalities=["real", "gen"]).save_pretrained(tmp_path / "trained")
    for place, message in (("without", "with other weights"), ("trained", "this model trains that one")):
        shutil.copy(folder / "whole" / DETECTOR_FILE, tmp_path / place)
        with pytest.raises(ValueError, match=message):
            GmailCLIPModel.from_pretrained(tmp_path / place)
