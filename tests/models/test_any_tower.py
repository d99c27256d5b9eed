"""`attach_branches` on vision models of transformers that have no class in this package."""

import copy

import pytest
import torch
import transformers as t
from tiny import randomise

from gmail_hf import attach_branches

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ["aimv2_vision_model", "beit", "chinese_clip_vision_model", "data2vec-vision", "deit", "ijepa"]
KINDS += ["internvl_vision", "pixio", "radio", "tipsv2_vision_model", "vit_msn"]
NAMES = ["gen", "real", "gen"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_image_takes_its_branch(kind):
    torch.manual_seed(0)
    config = t.AutoConfig.for_model(kind, **SIZES, image_size=16, patch_size=8)
    plain = t.AutoModel.from_config(config).eval()
    for parameter in plain.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    tower = copy.deepcopy(plain)
    attach_branches(tower)
    randomise(tower)
    images = torch.randn(3, 3, 16, 16)
    real, gen = (tower(images, modality=name).last_hidden_state for name in ("real", "gen"))
    assert torch.equal(real, plain(images).last_hidden_state)
    assert all((real - gen).abs().amax(dim=(1, 2)) > 1e-3)
    mixed = tower(images, modality=NAMES).last_hidden_state
    expected = torch.stack([real[1] if name == "real" else gen[row] for row, name in enumerate(NAMES)])
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    assert tower.prefix_tokens + 4 == real.shape[1]  # before four patches
    embeds, tokens = tower._embed(images, NAMES, token_layer=-1)
    assert embeds.shape == (3, 32) and tokens.shape == (3, 4, 32)
