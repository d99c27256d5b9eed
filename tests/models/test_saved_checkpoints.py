"""Folders in tests/checkpoints were saved at f0d7089; every later version must load them with the same numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import pixels

from gmail_hf import GmailCLIPModel

SAVED = Path(__file__).with_name("checkpoints")


@pytest.mark.parametrize("folder", ["whole", "adapters"])
def test_saved_checkpoints_give_the_same_embeddings(folder, tmp_path, monkeypatch):
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # the adapters name their base by the relative path "base"
    model = GmailCLIPModel.from_pretrained(folder)

    expected = json.loads((SAVED / "embeds.json").read_text())
    with torch.no_grad():
        for modality, values in expected.items():
            embeds = model.embed_images(pixels(2), modality)
            torch.testing.assert_close(embeds, torch.tensor(values), rtol=0, atol=1e-6)
    assert expected["gen"] != expected["real"]
