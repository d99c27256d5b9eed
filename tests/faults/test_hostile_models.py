"""Model folders from elsewhere: refused in seconds, with a reason."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model

from gmail_hf import GmailCLIPModel
from gmail_hf.branches.peft_folders import SIGNATURE

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(clip_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(clip_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change(file, update):
    content = json.loads(file.read_text())
    update(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/secret.safetensors"])
def test_an_index_stays_in_its_folder(name, folder):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    keys = load_file(folder.parent / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)}))
    for load in (GmailCLIPModel.from_pretrained, GmailCLIPModel.from_base):
        with pytest.raises(ValueError, match="not next to it: .*secret.safetensors"):
            load(folder)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("vision_config", "num_hidden_layers", 10**6, "num_hidden_layers=1000000; the limit is 1000"),
        ("text_config", "num_hidden_layers", 10**9, "the limit is 1000"),
        ("vision_config", "image_size", 10**7, "image_size=10000000"),
        ("vision_config", "hidden_size", float("inf"), "hidden_size=inf"),
        (None, "modalities", ["real", *(f"b{i}" for i in range(2000))], "lists 2001 branches"),
        (None, "lora_alpha", float("nan"), "lora_alpha"),
        (None, "lora_alpha", float("inf"), "lora_alpha"),
    ],
)
def test_absurd_settings_are_refused(part, field, value, message, folder):
    change(folder / "config.json", lambda config: (config[part] if part else config).update({field: value}))
    with pytest.raises(Exception, match=message):
        GmailCLIPModel.from_pretrained(folder)


def test_deeply_nested_files_are_refused(folder, clip_folder):
    path = folder / "gen" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "pt", SIGNATURE: "[" * 100_000})
    with pytest.raises(ValueError, match="signature in .* is damaged"):
        make_model(clip_folder).load_adapters(folder)
    save_file(tensors, path, metadata={"format": "pt", SIGNATURE: '{"a": ["x"]}'})
    with pytest.raises(ValueError, match="not consist of lists of numbers"):
        make_model(clip_folder).load_adapters(folder)
    (folder / "config.json").write_text("[" * 100_000)
    (folder / "model.safetensors").unlink()
    for load in (GmailCLIPModel.from_pretrained, GmailCLIPModel.from_base):
        with pytest.raises(ValueError, match="config.json is damaged"):
            load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7])
def test_weights_that_are_no_finite_numbers_are_refused(value, folder, clip_folder, tmp_path):
    base = shutil.copytree(clip_folder, tmp_path / "base")
    for place, load in ((folder, GmailCLIPModel.from_pretrained), (base, GmailCLIPModel.from_base)):
        tensors = load_file(place / "model.safetensors")
        name = next(name for name in tensors if name.endswith("fc1.weight"))
        full = torch.full_like(tensors[name], 0 if value == 7 else value)
        tensors[name] = full.to(torch.int8) if value == 7 else full
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="not finite|not floating-point numbers: .*fc1.weight"):
            load(place)


def test_an_adapter_without_a_signature_warns(folder, clip_folder, caplog):
    path = folder / "gen" / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    make_model(clip_folder).load_adapters(folder, "gen")
    assert "has no signature" in caplog.text
