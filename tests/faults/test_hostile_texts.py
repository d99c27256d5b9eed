"""Names and texts from elsewhere in cards and reports."""

import json

import pytest

from gmail_hf import GmailConfig
from gmail_hf.evaluation.report import to_html
from gmail_hf.metrics.scores import escaped, to_markdown
from gmail_hf.publishing.dataset_cards import dataset_card
from gmail_hf.publishing.model_cards import render_card
from gmail_hf.publishing.results import results_text

HOSTILE = "x`\n\n# Owned\n| a | b |\n<script>alert(1)</script>"


def check(text):
    assert "\n# Owned" not in text and "<script>" not in text and "| a | b |" not in text and "Owned" in text


def test_a_text_becomes_one_harmless_line():
    assert escaped("a  b\nc") == "a b c" and escaped("plain-name_1.0/x") == "plain-name_1.0/x"
    assert escaped({"a|b": ["<i>", 1, None]}) == {"a\\|b": ["&lt;i&gt;", 1, None]}


def test_model_cards():
    base = {"name": HOSTILE, "revision": HOSTILE, "on_hub": False, "license": None}
    pairs = {**base, "split": HOSTILE, "pairs": 3, "generators": [base]}
    config = {**GmailConfig().to_dict(), "lora_targets": [HOSTILE]}
    args = {"optim": HOSTILE}
    check(str(render_card("org/name", config, args, base, {"train_dataset": pairs})))


def test_cards_of_data_sets():
    settings = dict.fromkeys(
        ("pipeline", "scheduler", "dtype", "image_format", "negative_prompt", "generator", "generator_revision"),
        HOSTILE,
    )
    settings |= {"num_inference_steps": 1, "guidance_scale": 1.0, "images_per_caption": 1, "seed": 0}
    settings |= {"safety_policy": "keep", "real_images": "keep"}
    names = ("dataset_name", "dataset_revision", "dataset_split", "caption_column", "captions_license")
    manifest = {"settings": settings, "source": dict.fromkeys(names, HOSTILE) | {"captions_license": None}}
    manifest |= {"fingerprint": "0", "num_shards": 1}
    counts = dict.fromkeys(("shards", "rows", "images", "captions", "truncated", "nsfw", "unchecked"), 1)
    check(str(dataset_card("org/name", {"train": manifest}, {"train": counts})))


@pytest.fixture
def result():
    measured = {"scores": {"top1": 0.5, HOSTILE: None}, "intervals": {}, "counts": {HOSTILE: 3}}
    measured |= {"missing": {HOSTILE: HOSTILE}, "examples": [], "figures": {}}
    return {
        "benchmark": "mine",
        "title": HOSTILE,
        "source": HOSTILE,
        "paper": None,
        "models": {"clip": {"name": HOSTILE, "revision": HOSTILE}},
        "dataset": {"name": HOSTILE, "revision": HOSTILE, "split": HOSTILE, "limit": None},
        "settings": {"modality": "real"},
        "environment": {
            "machine": HOSTILE, "python": "3", "packages": {}, "git_commit": "0", "uncommitted_changes": False,
            "date": "today",
        },
        "seconds": 1,
        "tasks": {"zero_shot": measured},
    }  # fmt: skip


def test_reports(result):
    check(to_markdown([result]))
    check(results_text([result]))


@pytest.mark.parametrize("name", ["../token.png", "/etc/hostname", "link.png"])
def test_a_report_shows_no_file_from_elsewhere(name, result, tmp_path):
    (tmp_path / "token.png").write_text("secret")
    folder = tmp_path / "scores"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "token.png")
    result["tasks"]["zero_shot"]["figures"] = {"figure": name}
    (folder / "mine.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="outside that folder"):
        to_html([result], folder)
