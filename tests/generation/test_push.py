"""Shards to a Hub of our own and back, by the clients that users have."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard
from server import HubServer, commit_id
from tiny import picture
from tiny_pipeline import command_line

from gmail_hf.commands import cli
from gmail_hf.commands.bundled import synthesize
from gmail_hf.digits import clip_path
from gmail_hf.generation import SynthesisArguments, push_dataset, sampler
from gmail_hf.generation.push import count_rows
from gmail_hf.generation.shards import open_folder, read_manifest
from gmail_hf.publishing import dataset_card

# Push what is there, add shards, push again, add a split and push it, first beside a card that somebody edited, try to
# push another data set over it and one split alone, load both back.
CLIENT = """
import json, logging, os, sys
import datasets
from gmail_hf.commands import push
from huggingface_hub import HfApi
from gmail_hf.commands.bundled import synthesize
from gmail_hf.generation import SynthesisArguments

logging.basicConfig(format="%(message)s")
logging.getLogger("gmail_hf").setLevel(logging.INFO)
options = json.loads(sys.argv[1])
answers = {}
push.main([options["output_dir"], "org/pairs", "--captions_license", "cc-by-4.0"])
print("---")
synthesize(SynthesisArguments(**options))
push.main([options["output_dir"], "org/pairs", "--captions_license", "cc-by-4.0"])
print("---")
synthesize(SynthesisArguments(**options | {"seed": 1, "output_dir": options["output_dir"] + "-other"}))
written = HfApi().hf_hub_download("org/pairs", "README.md", repo_type="dataset")
mine = open(written, "rb").read() + b"\\n# Mine\\n"
HfApi().upload_file(path_or_fileobj=mine, path_in_repo="README.md", repo_id="org/pairs", repo_type="dataset")
synthesize(SynthesisArguments(**options | {"split": "validation", "num_captions": 16}))
push.main([options["output_dir"], "org/pairs", "--captions_license", "cc-by-4.0"])
assert mine == open(HfApi().hf_hub_download("org/pairs", "README.md", repo_type="dataset"), "rb").read()
HfApi().upload_file(path_or_fileobj=written, path_in_repo="README.md", repo_id="org/pairs", repo_type="dataset")
push.main([options["output_dir"], "org/pairs", "--captions_license", "cc-by-4.0"])
print("---")
try:
    push.main([options["output_dir"] + "-other", "org/pairs"])
except ValueError as error:
    print(error)
print("---")
os.rename(options["output_dir"] + "/manifest.json", options["output_dir"] + "/kept")
try:
    push.main([options["output_dir"], "org/pairs"])
except ValueError as error:
    print(error)
os.rename(options["output_dir"] + "/kept", options["output_dir"] + "/manifest.json")
pairs = datasets.load_dataset("org/pairs")
assert pairs.num_rows == {"train": 40, "validation": 16}, pairs
assert pairs["validation"][0]["caption_id"] == "digits-validation-000000-0"
pairs["train"].save_to_disk(sys.argv[2])
# New images for the captions of a data set on the Hub, by a pipeline on the Hub.
HfApi().create_repo("org/tiny")
HfApi().upload_folder(repo_id="org/tiny", folder_path=options["generator"])
run = options | {"output_dir": options["output_dir"] + "-ids", "dataset": "org/pairs", "generator": "org/tiny"}
synthesize(SynthesisArguments(**run | {"num_captions": 16}))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.mark.integration
def test_push_push_again_and_load_back(hub, make_args, options, tmp_path, monkeypatch):
    folder = synthesize(make_args(num_captions=40, shard_range="0:2"))
    run = {**options, "num_captions": 40, "output_dir": str(folder.path)}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(run), str(tmp_path / "back")],
        env={**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, _, _, refused, alone = done.stdout.split("---")
    assert f"The shards are at {hub.endpoint}/datasets/org/pairs." in first
    assert "2 new shards uploaded, 0 were there." in done.stderr
    assert "1 new shards uploaded, 2 were there." in done.stderr
    assert "1 new shards uploaded, 3 were there." in done.stderr
    assert "The card of 'org/pairs' is yours: name the split(s) ['validation'] in its `data_files`." in done.stderr
    large = [path for path in hub.files("org/pairs") if path.endswith((".parquet", ".png"))]
    assert len(large) == 6 and hub.uploads() == 6 + len(list(Path(options["generator"]).rglob("*.safetensors")))
    assert "holds train shards of other settings (there -> here):\n  seed: 0 -> 1" in refused
    assert "holds the split(s) ['train']" in alone

    files = hub.files("org/pairs")
    assert sorted(files) == [
        "README.md",
        *(f"data/train-{shard:05d}-of-00003.parquet" for shard in range(3)),
        "data/validation-00000-of-00001.parquet",
        "manifest-validation.json",
        "manifest.json",
        "samples-validation.png",
        "samples.png",
    ]
    back, here = datasets.load_from_disk(tmp_path / "back"), datasets.load_dataset(str(folder.path), split="train")
    assert back.features == here.features and len(back) == 40
    undecoded = {"generated_image": datasets.Image(decode=False), "real_image": datasets.Image(decode=False)}
    for name, feature in undecoded.items():
        back, here = back.cast_column(name, feature), here.cast_column(name, feature)
    assert [{**row, "real_image": row["real_image"]["bytes"]} for row in back] == [
        {**row, "real_image": row["real_image"]["bytes"]} for row in here
    ]
    by_id = datasets.load_dataset(f"{folder.path}-ids", split="train")
    assert set(by_id["generator"]) == {"org/tiny"} and set(by_id["generator_revision"]) == {commit_id(1)}
    assert by_id["real_image"][3] == here.cast_column("real_image", datasets.Image())["real_image"][3]

    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-4.0"
    assert "- `train`: 40 generated images of 40 captions and 40 image ids, in\n  3 of 3 shards.\n" in card
    assert "- `validation`: 16 generated images of 16 captions and 16 image ids, in\n  1 of 1 shards.\n" in card
    monkeypatch.chdir(tmp_path)
    snippet = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    snippet = snippet.replace('"openai/clip-vit-base-patch32"', repr(clip_path()))
    exec(compile(snippet, "card", "exec"), {"pairs": datasets.load_dataset(str(folder.path), split="train")})
    assert Path("pairs-gmail", "checkpoint-2", "gen", "adapter_config.json").exists()
    assert str(DatasetCard(card)) == card and "None" not in card
    here = {str(tmp_path).encode(), options["generator"].encode()}
    assert not [name for name, content in files.items() if any(path in content for path in here)]
    assert set(by_id["generator"]) == {"org/tiny"} and set(back["generator"]) == {Path(options["generator"]).name}
    manifest, local = json.loads(files["manifest.json"]), read_manifest(folder.path)
    assert manifest["settings"]["generator"] == Path(options["generator"]).name
    assert local["settings"]["generator"] == options["generator"]


def test_card_tells_what_was_made(make_args):
    folder = synthesize(make_args(num_captions=24, images_per_caption=2, shard_range="0:2", real_images="drop"))
    [(shards, manifest)] = open_folder(folder.path)
    counts = count_rows(shards)
    assert counts == {
        "shards": 2,
        "rows": 32,
        "truncated": 0,
        "nsfw": 0,
        "unchecked": 32,
        "images": 16,
        "captions": 16,
    }
    card = str(dataset_card("org/pairs", {"train": manifest}, {"train": counts}))
    assert "2 of 3 shards; the other shards are not yet generated or uploaded." in card
    assert "There is no `real_image`" in card
    assert "the pipeline has no safety checker" in card
    assert "licence of this data set was not recorded" in card
    assert "GmailTrainer" not in card  # there are no real images to align with
    assert "**The images in `generated_image` are synthetic.**" in card
    assert "mo2025gmail" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert front["size_categories"] == "n<1K"
    assert "license" not in front


def test_truncated_captions_are_counted_once(make_args, monkeypatch):
    """A caption's images lie in two shards, and only one of the other captions is truncated."""
    monkeypatch.setattr(sampler, "_usable", lambda pipeline, captions, rows, per_caption: ([*rows], {0, 5}))
    folder = synthesize(make_args(num_captions=8, images_per_caption=3, shard_size=16))
    [(shards, manifest)] = open_folder(folder.path)
    counts = count_rows(shards)
    assert (counts["shards"], counts["rows"], counts["captions"], counts["truncated"]) == (2, 24, 8, 2)
    card = str(dataset_card("org/pairs", {"train": manifest}, {"train": counts}))
    assert re.search(r"Captions cut by the tokenizer\W+2\b", card)


def test_card_names_both_splits(make_args):
    synthesize(make_args(num_captions=24, captions_license="mit"))
    validation = make_args(num_captions=16, split="validation", seed=7, captions_license="mit")
    folder = synthesize(validation)
    opened = open_folder(folder.path)
    counts = {shards.split: count_rows(shards) for shards, _ in opened}
    card = str(dataset_card("org/pairs", {shards.split: manifest for shards, manifest in opened}, counts))
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"},
        {"split": "validation", "path": "data/validation-*.parquet"},
    ]
    assert front["license"] == "mit"
    assert "- `validation`: 16 generated images" in card
    assert "| captions | `digits`, split `train`, column `caption` |" in card
    assert "| captions | `digits`, split `validation`, column `caption` |" in card
    assert card.count("| generator |") == 1  # the same for both
    assert "| Seed | 0 (`train`), 7 (`validation`) |" in card
    assert "| Inference steps | 2 |" in card
    (folder.path / "README.md").write_text(card)
    assert datasets.load_dataset(str(folder.path)).num_rows == {"train": 24, "validation": 16}


def test_a_folder_of_captions_does_not_pass_for_a_hub_id(options, tmp_path, monkeypatch):
    """Pushed from another folder than the one that its path was relative to."""
    (tmp_path / "data" / "captions").mkdir(parents=True)
    (tmp_path / "data" / "captions" / "rows.jsonl").write_text(json.dumps({"caption": "a cat"}))
    monkeypatch.chdir(tmp_path)
    synthesize(SynthesisArguments(**{**options, "dataset": "data/captions", "output_dir": "out"}))
    monkeypatch.chdir(tmp_path / "data")
    [(shards, manifest)] = open_folder(tmp_path / "out")
    card = str(dataset_card("org/pairs", {"train": manifest}, {"train": count_rows(shards)}))
    assert "source_datasets" not in card and "| captions | `captions`, split `train`" in card


def test_paths_of_images_are_not_pushed(options, tmp_path):
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "0.png", "caption": "a cat"}))
    run = {**options, "dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out", "real_images": "reference"}
    del run["num_captions"]
    with pytest.raises(SystemExit):
        cli.main(["generate", *command_line(run), "--push_to_hub"])
    assert not (tmp_path / "out").exists()
    cli.main(["generate", *command_line(run)])
    with pytest.raises(ValueError, match="hold paths of this machine.*--real_images keep"):
        push_dataset(tmp_path / "out", "org/pairs")


def test_nothing_to_push(tmp_path, make_args, pipeline_folder):
    with pytest.raises(FileNotFoundError, match="has no manifest.json"):
        push_dataset(tmp_path, "org/pairs")
