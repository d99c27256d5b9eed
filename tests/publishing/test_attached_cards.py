"""The snippets in the card of branches that `save_branches` wrote run, and give what the branches gave."""

import re

import pytest
import torch
from peft import PeftModel
from tiny import make_clip, make_processor, picture, pixels, randomise
from tiny_llava import save_llava
from transformers import AutoModel, CLIPVisionModel, LlavaForConditionalGeneration

from gmail_hf import attach_branches, from_vlm, save_branches
from gmail_hf.models.attached import attached_tower


def save_vlm(folder):
    save_llava(folder, make_clip())
    return from_vlm(folder)


def save_owner(folder):
    make_clip().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return attached(AutoModel.from_pretrained(folder))


def save_tower(folder):
    CLIPVisionModel(make_clip().config.vision_config).save_pretrained(folder)
    make_processor().image_processor.save_pretrained(folder)
    return attached(CLIPVisionModel.from_pretrained(folder))


def attached(model):
    attach_branches(model)
    return model


def run_card(folder) -> dict:
    variables: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), variables)
    return variables


CASES = {
    "vlm": (save_vlm, lambda model: model.model.vision_tower, LlavaForConditionalGeneration),
    "owner": (save_owner, lambda model: model.vision_model, AutoModel),
    "tower": (save_tower, lambda model: model, CLIPVisionModel),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whole", [False, True], ids=["branches", "whole"])
@torch.no_grad()
def test_snippets_of_attached_branches_run(tmp_path, monkeypatch, case, whole):
    monkeypatch.chdir(tmp_path)
    save, tower_of, plain_class = CASES[case]
    model = save(tmp_path / "base").eval()
    tower = attached_tower(model)
    randomise(tower)
    tower.save_pretrained("mine") if whole else save_branches(model, "mine")
    for i, name in enumerate(("photograph", "generated")):
        picture(i).save(f"{name}.png")
    variables = run_card(tmp_path / "mine")
    images, expected = pixels(2), tower(pixels(2), modality="gen").last_hidden_state
    assert not torch.allclose(tower(images, modality="real").last_hidden_state, expected, atol=1e-3)
    assert torch.equal(variables["model"].tower(images, modality="gen").last_hidden_state, expected)
    assert len(variables["answers" if case == "vlm" else "embeds"]) == 2
    assert isinstance(variables["adapted"], PeftModel)
    merged = plain_class.from_pretrained("mine-merged").eval()
    for plain in (merged, variables["base"].eval()):  # PEFT changed the layers of the second
        torch.testing.assert_close(tower_of(plain)(images).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
