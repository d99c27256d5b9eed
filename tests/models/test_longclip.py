"""Conversion of Long-CLIP's checkpoints, against a forward pass written from OpenAI's names."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_processor
from torch import nn
from transformers import AutoImageProcessor, AutoProcessor, CLIPModel

from gmail_hf import GmailCLIPModel, convert_longclip, from_base

WIDTH, TEXT_WIDTH, DIM, PATCH, GRID, POSITIONS, VOCABULARY = 128, 192, 24, 4, 3, 30, 514
LAYERS, TEXT_LAYERS = 2, 3


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, width, count):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(count))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty(GRID**2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Blocks(WIDTH, LAYERS)
        self.proj = nn.Parameter(torch.empty(WIDTH, DIM))

    def forward(self, images):
        x = self.conv1(images).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OfficialLongCLIP(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.transformer = Blocks(TEXT_WIDTH, TEXT_LAYERS)
        self.token_embedding = nn.Embedding(VOCABULARY, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, TEXT_WIDTH))
        self.positional_embedding_res = nn.Parameter(torch.empty(POSITIONS, TEXT_WIDTH))
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.empty(TEXT_WIDTH, DIM))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    def text(self, ids):
        early = (torch.arange(POSITIONS) < 20).unsqueeze(1)
        positions = torch.where(early, self.positional_embedding, self.positional_embedding_res)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        x = self.transformer(self.token_embedding(ids) + positions[: ids.shape[1]], mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


@pytest.fixture(scope="module")
def official():
    model = OfficialLongCLIP().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def save(official, tmp_path):
    """Write the official model's weights, changed, to a file."""

    def write(**changes):
        state = {**official.state_dict(), **changes}
        torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "longclip.pt")
        return tmp_path / "longclip.pt"

    return write


def inputs():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, GRID * PATCH, GRID * PATCH, generator=generator)
    ids = torch.randint(0, 500, (3, POSITIONS), generator=generator)
    ids[:, 0] = VOCABULARY - 2
    for row, length in enumerate((8, 22, POSITIONS)):
        ids[row, length - 1 :] = 0  # the official padding, after the end
        ids[row, length - 1] = VOCABULARY - 1
    return images, ids


@torch.no_grad()
def test_features_are_the_official_ones(official, save, tmp_path):
    convert_longclip(save(), tmp_path / "out")
    images, ids = inputs()
    clip, info = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    image_features, text_features = official.visual(images), official.text(ids)
    assert image_features.std() > 0.1 and text_features.std() > 0.1
    torch.testing.assert_close(clip.get_image_features(images).pooler_output, image_features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clip.get_text_features(ids).pooler_output, text_features, atol=1e-5, rtol=1e-5)
    assert torch.equal(clip.logit_scale, official.logit_scale)

    model = from_base(tmp_path / "out")
    assert type(model) is GmailCLIPModel
    expected = nn.functional.normalize(image_features, dim=-1)
    torch.testing.assert_close(model.embed_images(images, "gen"), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_and_old_settings(official, save, tmp_path):
    half = {name: tensor.half() for name, tensor in official.state_dict().items()}
    convert_longclip(save(**half, context_length=torch.tensor(POSITIONS)), tmp_path / "out")
    clip = CLIPModel.from_pretrained(tmp_path / "out")
    assert clip.dtype == torch.float32
    assert torch.equal(clip.visual_projection.weight, half["visual.proj"].T.float())


def test_processors(save, tmp_path):
    make_processor().save_pretrained(tmp_path / "clip")
    convert_longclip(save(), tmp_path / "out", processor=tmp_path / "clip")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.model_max_length == POSITIONS
    tokens = processor(text=["a" * 50, "b"], padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (2, POSITIONS)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    size = GRID * PATCH
    expected = np.asarray(Image.fromarray(pixels).resize((19, size), Image.Resampling.BICUBIC))[:, 3:15] / 255
    expected = (expected - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    convert_longclip(save(), tmp_path / "images")  # without a tokenizer
    assert not (tmp_path / "images" / "tokenizer.json").exists()
    for images in (processor.image_processor, AutoImageProcessor.from_pretrained(tmp_path / "images")):
        actual = images(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(actual, torch.from_numpy(expected).permute(2, 0, 1).float(), atol=1e-5, rtol=0)


def test_a_tokenizer_of_another_vocabulary_is_refused(save, tmp_path):
    make_processor().save_pretrained(tmp_path / "clip")
    checkpoint = save(**{"token_embedding.weight": torch.zeros(600, TEXT_WIDTH)})
    with pytest.raises(ValueError, match="ends texts with token 513, but this model with its last token, 599"):
        convert_longclip(checkpoint, tmp_path / "out", processor=tmp_path / "clip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual.layer1.0.conv1.weight": torch.zeros(2)}, r"Unknown weights: visual\.layer1\.0\.conv1\.weight"),
        (
            {"transformer.resblocks.1.attn.in_proj_bias": None},
            "Missing weights: transformer.resblocks.1.attn",
        ),
        ({"visual.ln_post.weight": None}, r"Missing weights: visual\.ln_post\.weight"),
        ({"positional_embedding_res": None}, "lacks positional_embedding_res"),
        ({"visual.proj": None, "text_projection": None}, "lacks text_projection, visual.proj"),
        (
            {"visual.positional_embedding": torch.zeros(9, WIDTH)},
            "has 9 positions; expected a class token and",
        ),
        ({"visual.ln_post.weight": torch.zeros(WIDTH - 1)}, r"shape \(127,\); expected .* of shape \(128,\)"),
        ({"visual.ln_post.weight": torch.full((WIDTH,), torch.nan)}, "expected finite floating-point"),
        ({"visual.ln_post.weight": torch.ones(WIDTH, dtype=torch.int64)}, "is a torch.int64 tensor"),
    ],
)
def test_other_checkpoints_are_refused_by_name(save, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        convert_longclip(save(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class RunsCode:
    def __reduce__(self):
        return (print, ("code of a checkpoint ran",))


def test_code_in_checkpoints_does_not_run(tmp_path, capsys):
    torch.save({"model": RunsCode()}, tmp_path / "longclip.pt")
    with pytest.raises(ValueError, match="holds Python objects, which are not read"):
        convert_longclip(tmp_path / "longclip.pt", tmp_path / "out")
    torch.save([1, 2], tmp_path / "longclip.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        convert_longclip(tmp_path / "longclip.pt", tmp_path / "out")
    assert "ran" not in capsys.readouterr().out
