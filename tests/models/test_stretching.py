"""Longer text contexts: positions worked by hand, unchanged short texts, long texts read to their end."""

import pytest
import torch
from tiny import IMAGE_SIZE, assert_equal, clip_config, make_clip, make_processor, randomise
from torch import nn
from towers import make
from transformers import AutoModel, CLIPModel, SiglipModel

from gmail_hf import GmailCLIPModel, stretch_positions
from gmail_hf.evaluation.embedding import text_embeds
from gmail_hf.evaluation.measure import Settings

OLD = 40  # positions of the tiny CLIP


def with_positions(values: list[float]) -> CLIPModel:
    config = clip_config()
    config.text_config.max_position_embeddings = len(values)
    clip = CLIPModel(config)
    column = torch.tensor(values).unsqueeze(1)
    clip.text_model.embeddings.position_embedding.weight.data = column.repeat(1, config.text_config.hidden_size)
    return clip


def positions(clip) -> torch.Tensor:
    return clip.text_model.embeddings.position_embedding.weight


def ids(*lengths: int) -> list[torch.Tensor]:
    """One text of each number of tokens."""
    generator = torch.Generator().manual_seed(0)
    bodies = [torch.randint(0, 500, (1, length - 2), generator=generator) for length in lengths]
    return [torch.cat([torch.tensor([[512]]), body, torch.tensor([[513]])], dim=1) for body in bodies]


@torch.no_grad()
def embed(model, input_ids: torch.Tensor) -> torch.Tensor:
    return model.get_text_features(input_ids=input_ids).pooler_output


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        # Factor 2: halfway between neighbours; after the last, half a step more.
        (6, [5.0, 7.0, 0.0, 2.0, 4.0, 6.0]),
        # Factor 3/2: positions 2, 2 + 2/3 and 3 + 1/3 of the old ones.
        (5, [5.0, 7.0, 0.0, 4 * 2 / 3, 4 * 4 / 3]),
        # Factor 4: three steps of a quarter after the last.
        (10, [5.0, 7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
    ],
)
def test_positions_by_hand(length, expected):
    clip = with_positions([5.0, 7.0, 0.0, 4.0])
    stretch_positions(clip, length, keep=2)
    torch.testing.assert_close(positions(clip)[:, 0], torch.tensor(expected))
    torch.testing.assert_close(positions(clip)[:, -1], torch.tensor(expected))


def test_the_default_is_long_clips():
    clip = with_positions([float(i) ** 2 for i in range(77)])
    stretch_positions(clip)
    column = positions(clip)[:, 0]
    assert len(column) == clip.config.text_config.max_position_embeddings == 248
    assert clip.text_model.config.max_position_embeddings == 248
    assert torch.equal(column[:20], torch.arange(20.0) ** 2)
    assert torch.equal(column[20:248:4], torch.arange(20.0, 77.0) ** 2)  # every fourth is an old one
    between = [20**2, 20**2 + 41 / 4, 20**2 + 82 / 4, 20**2 + 123 / 4]
    torch.testing.assert_close(column[20:24], torch.tensor(between))
    step = 76**2 - 75**2
    beyond = [76**2 + step * i / 4 for i in range(4)]
    torch.testing.assert_close(column[-4:], torch.tensor(beyond))


@pytest.mark.parametrize("keep", [2, 7, OLD - 2])
def test_texts_within_the_kept_positions_are_unchanged(keep):
    short, long = ids(keep, OLD)
    clip = make_clip()
    before = [embed(clip, text) for text in (short, long)]
    stretch_positions(clip, 64, keep)
    assert torch.equal(embed(clip, short), before[0])
    assert not torch.allclose(embed(clip, long), before[1], atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "metaclip_2", "branches"])
def test_stretched_models_come_back(name, tmp_path, clip_folder):
    model = randomise(GmailCLIPModel.from_base(clip_folder)) if name == "branches" else make(name)
    stretch_positions(model, 64, keep=5)
    model.eval().save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert_equal(again.state_dict(), model.state_dict())
    for input_ids in ids(8, 64):
        input_ids = input_ids.clamp(max=model.config.text_config.vocab_size - 1)
        torch.testing.assert_close(embed(again, input_ids), embed(model, input_ids), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="max_position_embeddings: 64"):
        embed(model, torch.zeros(1, 65, dtype=torch.long))


def test_a_stretched_clip_is_a_base(tmp_path):
    clip = make_clip()
    stretch_positions(clip, 64, keep=5)
    clip.save_pretrained(tmp_path)
    model = GmailCLIPModel.from_base(tmp_path)
    (text,) = ids(64)
    expected = nn.functional.normalize(embed(clip, text), dim=-1)
    torch.testing.assert_close(model.embed_text(text), expected, atol=1e-6, rtol=1e-6)
    assert model.to_base("gen").config.text_config.max_position_embeddings == 64


def test_stretched_branches_no_longer_name_their_base(clip_folder, tmp_path):
    model = randomise(GmailCLIPModel.from_base(clip_folder))
    stretch_positions(model, 64, keep=5)
    assert not positions(model).requires_grad and model.trains("gen")
    model.save_adapters(tmp_path)
    with pytest.raises(ValueError, match="names no base"):
        GmailCLIPModel.from_pretrained(tmp_path)
    clip = CLIPModel.from_pretrained(clip_folder)
    stretch_positions(clip, 64, keep=5)
    again = GmailCLIPModel.adopt(clip)
    again.load_adapters(tmp_path)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.embed_images(images, "gen"), model.embed_images(images, "gen"))


def test_captions_longer_than_the_old_context_are_not_cut(clip_folder):
    """Each letter is a token: the captions differ only after the old context."""
    captions = ["a" * (OLD + 5) + end for end in ("bcd", "xyz")]
    model, processor = GmailCLIPModel.from_base(clip_folder), make_processor()
    settings = Settings(progress=False)
    cut = text_embeds(model, processor, captions, settings, None)
    assert (cut[0] == cut[1]).all()
    stretch_positions(model, 64, keep=5)
    processor.tokenizer.model_max_length = 64
    whole = text_embeds(model, processor, captions, settings, None)
    assert abs(whole[0] - whole[1]).max() > 1e-3
    tokens = processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (2, OLD + 10)
    torch.testing.assert_close(model.embed_text(**tokens), torch.from_numpy(whole), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": OLD}, "already has 40 text positions: `length` must be larger, got 40"),
        ({"keep": -1}, r"in \[0, 38\]"),
        ({"keep": OLD - 1}, r"in \[0, 38\]"),
    ],
)
def test_mistakes_are_refused(arguments, message):
    clip = make_clip()
    with pytest.raises(ValueError, match=message):
        stretch_positions(clip, **arguments)
    assert len(positions(clip)) == OLD


def test_other_models_are_refused():
    siglip = make("siglip")
    assert isinstance(siglip, SiglipModel)
    with pytest.raises(TypeError, match="got SiglipModel"):
        stretch_positions(siglip)
