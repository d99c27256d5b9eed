"""Conversion of SynCLR's checkpoints, against a forward pass written from timm's names."""

import argparse
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, ViTModel

from gmail_hf import GmailViTModel, convert_synclr, from_base

WIDTH, PATCH, GRID, LAYERS = 128, 4, 3, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, WIDTH // 64, 64)).permute(2, 0, 3, 1, 4)  # (images, heads, tokens, 64)
        attention = (q @ k.mT / 8).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class OfficialViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.empty(1, GRID**2 + 1, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed["proj"](images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@pytest.fixture(scope="module")
def official():
    model = OfficialViT().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.1 * torch.randn(parameter.shape, generator=generator)
    # So small that a wrong epsilon shows.
    model.cls_token.data, model.pos_embed.data[:, 0] = model.cls_token.data * 1e-3, 0
    return model


@pytest.fixture
def save(official, tmp_path):
    def write(prefix="module.visual.", entry="model", **changes):
        state = {prefix + name: value for name, value in {**official.state_dict(), **changes}.items()}
        state = {name: value for name, value in state.items() if value is not None}
        state["module.image_mlp.0.weight"] = torch.zeros(2, 2)
        settings = {"epoch": 7, "args": argparse.Namespace(model="base")}
        torch.save({entry: state, **settings} if entry else state, tmp_path / "synclr.pth")
        return tmp_path / "synclr.pth"

    return write


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["module.visual.", "visual."])
@pytest.mark.parametrize("entry", ["model", "state_dict", None])
def test_features_are_the_official_ones(official, save, tmp_path, prefix, entry):
    convert_synclr(save(prefix, entry), tmp_path / "out")
    images = torch.randn(3, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(1))
    vit, info = ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = official(images)
    torch.testing.assert_close(vit(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    model = from_base(tmp_path / "out")
    assert type(model) is GmailViTModel
    expected = nn.functional.normalize(expected[:, 0], dim=-1)
    torch.testing.assert_close(model.embed_images(images, "gen"), expected, atol=1e-5, rtol=1e-5)


def test_the_processor_is_that_of_its_evaluation(save, tmp_path):
    convert_synclr(save(), tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((19, 12), Image.Resampling.BICUBIC))[:, 3:15] / 255
    expected = torch.from_numpy((expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1).float()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    actual = processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_weights_outside_the_encoder_are_counted(save, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(logging.getLogger("gmail_hf.models.synclr"), "info", messages.append)
    convert_synclr(save(mask_token=torch.zeros(1, 1, WIDTH), **{"head.bias": torch.zeros(2)}), tmp_path / "out")
    assert len(messages) == 1 and messages[0].startswith("Left out 3 weights of ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fc_norm.weight": torch.zeros(WIDTH)}, "Unknown weights: fc_norm.weight"),
        ({"blocks.1.attn.qkv.bias": None}, "Missing weights: blocks.1.attn.qkv.bias"),
        ({"pos_embed": None}, "lacks pos_embed"),
        ({"prefix": "encoder."}, "lacks blocks.0.mlp.fc1.weight, patch_embed.proj.weight, pos_embed"),
    ],
)
def test_other_checkpoints_are_refused_by_name(save, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_synclr(save(**arguments), tmp_path / "out")
    assert not (tmp_path / "out").exists()
