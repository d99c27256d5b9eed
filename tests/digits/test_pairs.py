"""The bundled pairs, and the name `digits` on the command line."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gmail_hf.commands import bundled
from gmail_hf.digits import clip_path, generate, generator_path, llama_path, load_digits, load_pairs
from gmail_hf.digits.questions import QUESTIONS, scene_messages
from gmail_hf.generation import SynthesisArguments


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


def test_generator_by_name():
    args = SynthesisArguments(output_dir="out", dataset="digits", generator="digits", num_captions=4)
    job = bundled.make_job(args)
    assert (job.generator.name, job.generator.path, job.settings["generator"]) == (
        "digits",
        generator_path(),
        "digits",
    )
    assert job.generator.call == {"num_inference_steps": 7, "guidance_scale": 7.5}
    assert job.captions.caption_ids[3] == "digits-train-000003-0" and job.folder.num_shards == 1
    changed = bundled.make_job(replace(args, num_inference_steps=3, guidance_scale=2.0))
    assert changed.generator.call == {"num_inference_steps": 3, "guidance_scale": 2.0}


def test_scenes_are_asked_all_questions():
    scenes = load_digits("test", 2)
    asked = bundled.conversations(scenes, "real_image", "scenes")
    assert asked.kinds == list(QUESTIONS) and len(asked) == 2 * len(QUESTIONS)
    assert asked[6]["messages"] == scene_messages(scenes[1], ["right_digit"]) and asked[6]["kind"] == "right_digit"
    with_chats = scenes.add_column("messages", [scene_messages(scene) for scene in scenes])
    assert bundled.conversations(with_chats, "real_image", "scenes").kinds == ["messages"]


def test_the_name_is_known_here_and_to_the_commands_alone():
    package = Path(bundled.__file__).parents[1]
    files = [path for path in package.rglob("*.py") if path.parent.name not in ("digits", "commands")]
    assert len(files) > 50
    assert not [path for path in files if re.search(r"""["'`]digits["'`]|\.digits\b""", path.read_text())]
