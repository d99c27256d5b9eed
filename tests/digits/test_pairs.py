"""The bundled pairs, and the name `digits` on the command line."""

import pytest

from gmail_hf.commands import bundled
from gmail_hf.digits import clip_path, generate, llama_path, load_pairs


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The seeds that pairs were generated with; the real image takes the place of the generated one."""
    seeds = []

    def fake(scenes, seed):
        seeds.append(seed)
        return scenes.add_column("generated_image", scenes.with_format("arrow")["real_image"])

    monkeypatch.setattr(generate, "generate_pairs", fake)
    return seeds


def test_pairs_are_made_once_for_each_setting(made, monkeypatch):
    for _ in range(2):
        load_pairs(max_samples=4)
    monkeypatch.setattr(generate, "GUIDANCE_SCALE", 3.0)
    load_pairs(max_samples=4)
    load_pairs(max_samples=4, seed=1)
    assert made == [0, 0, 1]


def test_pairs_by_name(made):
    pairs = bundled.load_pairs("digits", "test", columns={"text": "caption", "image_id": "image_id"}, max_samples=3)
    assert pairs["text"][:] == load_pairs("test", 3)["caption"][:]
    assert pairs.info.dataset_name == "digits" and str(pairs.split) == "test"
    with pytest.raises(ValueError, match=r"'digits' has no column\(s\) \['words'\]; it has \['real_image'"):
        bundled.load_pairs("digits", "test", columns={"caption": "words"}, max_samples=3)


def test_models_by_name():
    assert bundled.model_path("digits") == clip_path()
    assert bundled.text_model_path("digits") == llama_path()
    assert bundled.model_path("org/name") == bundled.text_model_path("org/name") == "org/name"
