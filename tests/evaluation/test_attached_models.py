"""Branches that `save_branches` wrote are evaluated on the vision-language model that they name."""

import copy

import pytest
import torch
from benchmark_data import png_cell
from datasets import Dataset, Image
from tiny import picture

from gmail_hf import embed_images, from_vlm, save_branches
from gmail_hf.branches.tower import is_adapter_weight
from gmail_hf.commands.common import load_two_branches
from gmail_hf.evaluation import Settings, evaluate_vqa, load_model
from gmail_hf.evaluation.answering import write


def test_branches_are_loaded_onto_their_model(loaded, source, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "branches"
    loaded["llava"].model.to_llava("real").save_pretrained(base)
    loaded["llava"].processor.save_pretrained(base)
    vlm = from_vlm(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if is_adapter_weight(name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_branches(vlm, folder)
    found = load_model(str(folder))
    assert not found.embeds and not found.model.training and found.revision.startswith("files ")
    found.check_modality("gen")
    with pytest.raises(ValueError, match=r"no branch 'fake'; it has \['real', 'gen'\]"):
        found.check_modality("fake")
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    images, plain = [[picture(i)] for i in range(3)], load_model(str(base))

    def describe(model, modality):
        messages = [[{"role": "user", "content": content}]] * 3
        return write(model, found.processor, images, messages, modality, max_new_tokens=12, do_sample=False)

    gen = describe(found.model, "gen")
    assert gen == describe(vlm.eval(), "gen") == describe(copy.deepcopy(vlm), "gen")  # a copy keeps its branches
    assert gen == describe(vlm.to_base("gen"), "real") != describe(found.model, "real")
    assert describe(found.model, "real") == describe(plain.model, "real")
    row = {"image": png_cell(picture(0)), "question": "Is there a two?", "answer": "no", "category": "random"}
    Dataset.from_list([row]).cast_column("image", Image()).to_parquet(tmp_path / "test.parquet")
    questions = source("pope", tmp_path / "test.parquet")
    answer = evaluate_vqa(found.model, found.processor, questions, Settings("gen")).predictions[0]
    assert answer["choice"] in ("yes", "no")
    tower, image_processor = load_two_branches(str(folder))  # of gmail-hf embed
    pictures = [picture(i) for i in range(2)]
    for modality in ("gen", "real"):
        expected = embed_images(vlm.tower, image_processor, pictures, modality)
        torch.testing.assert_close(embed_images(tower.eval(), image_processor, pictures, modality), expected)
