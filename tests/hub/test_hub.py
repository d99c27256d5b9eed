"""Models, adapters, processors and pairs to a Hub of our own and back, by the clients that users have."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from hub_cases import load_tensors
from server import HubServer, commit_id
from tiny import make_clip, make_model, make_pairs, randomise

from gmail_hf import GmailCLIPModel, GmailVisionModel, GmailVisionModelWithProjection

pytestmark = pytest.mark.integration

CASES = Path(__file__).with_name("hub_cases.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def run(hub, folder):
    """Run a case in a process whose cache is `home`; its tensors and answers."""

    def case(name, home, **environment):
        done = subprocess.run(
            [sys.executable, str(CASES), name, str(folder)],
            env={**os.environ, **hub.environment(folder / home), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return load_tensors(folder, name), json.loads((folder / f"{name}.json").read_text())

    return case


@pytest.fixture(scope="module")
def published(run):
    return run("publish", "author")


@pytest.fixture(scope="module")
def read(run, published):
    return run("read", "reader")


def assert_same_outputs(actual, prefix, expected, **tolerance):
    more = [name for name in ("auto", "generated_probability") if name in expected]
    for name in ("real", "gen", "text", "logits_real", "logits_gen", *more):
        torch.testing.assert_close(actual[f"{prefix}.{name}"], expected[name], **tolerance)


def scores(answer):
    return pytest.approx({entry["label"]: entry["score"] for entry in answer}, abs=1e-5)


def test_model_comes_back_as_it_was(published, read):
    expected, tensors = published[0], read[0]
    assert not torch.allclose(expected["real"], expected["gen"], atol=1e-2) and "auto" in expected
    for name in ("whole", "adapters", "by_hand"):
        assert_same_outputs(tensors, name, expected, atol=0, rtol=0)
    assert torch.equal(tensors["clip.real"], expected["real"])
    torch.testing.assert_close(tensors["peft.gen"], expected["gen"], atol=1e-5, rtol=1e-5)


def test_what_the_trainer_pushed_is_what_it_trained(published, read):
    expected = {name.partition(".")[2]: tensor for name, tensor in published[0].items() if name.startswith("trained.")}
    assert_same_outputs(read[0], "trained", expected, atol=0, rtol=0)


def test_no_path_of_this_machine_is_pushed(hub, published, folder):
    pushed = [files for commits in hub.commits.values() for files in commits]
    assert not [name for files in pushed for name, oid in files.items() if bytes(folder) in hub.contents[oid]]
    local = json.loads((folder / "run" / "config.json").read_text())
    for repo_id in ("org/trained", "org/on-local-base"):
        public = json.loads(hub.files(repo_id, "model")["config.json"])
        assert public == {**local, "base_model_name_or_path": "base"}
        assert local["base_model_name_or_path"] == str(folder / "base")
    assert len(hub.commits["model", "org/trained"]) >= 3  # the empty one, at least one save, and the end
    names = set().union(*hub.commits["model", "org/trained"])
    assert not [name for name in names if name.startswith(("runs/", "checkpoint-", "_", ".")) or "part" in name]
    assert {"trainer_state.json", "training_args.json", "provenance.json", "gen/adapter_config.json"} <= names


def test_pipelines_agree(read):
    answers = read[1]
    assert {entry["label"]: entry["score"] for entry in answers["org/gmail-adapters"]} == scores(
        answers["org/gmail-coco"]
    )


def test_a_push_is_one_commit(hub, published, read):
    expected = {
        "org/gmail-adapters": ["detector.safetensors"],
        "org/cut": ["model.safetensors"],
    }
    for repo_id, more in expected.items():
        first, *commits = hub.commits["model", repo_id]
        names = [path for path in commits[0] if path != "README.md"]
        adapters = ["gen", "real"] if repo_id == "org/cut" else ["gen", "real", "text"]
        files = [f"{name}/adapter_{file}" for name in adapters for file in ("config.json", "model.safetensors")]
        assert not first and sorted(names) == sorted([*files, "config.json", *more]), repo_id
    assert published[1]["onto_whole"].startswith("ValueError: 'org/gmail-coco' has a complete checkpoint")


def test_a_cut_push_publishes_nothing(hub, published):
    answers = published[1]
    assert answers["cut"].startswith("RuntimeError: Error while uploading")
    assert answers["after_cut"].startswith("OSError: Found neither model.safetensors nor real/adapter_config.json")
    assert "its upload was completed" in answers["after_cut"]
    assert answers["after_retry"] is None and len(hub.commits["model", "org/cut"]) == 2


def test_adapters_stay_with_the_commit_of_their_base(published, read):
    assert published[1]["base_revision"] == commit_id(1)
    adapters = read[1]["adapters"]
    assert adapters == {"base": ["org/clip", commit_id(1)], "name_or_path": "org/gmail-adapters", "trained": True}


@pytest.mark.parametrize(
    ("case", "expected"),
    {
        "private": ["OSError: org/gmail-adapters is not", "private repository", "token"],
        "nowhere": ["OSError: org/nowhere is not"],
        "revision": ["OSError: v9 is not a valid git identifier"],
        "adapters_revision": ["OSError: v9 is not a valid git identifier"],
        "clip_revision": ["OSError: v9 is not a valid git identifier"],
        "wrong_base": ["ValueError: ", f"base is 'org/clip' at revision {commit_id(1)} with other weights"],
        "lost_base": ["OSError: 'org/lost-base' contains only adapters, and their base 'org/clip' at revision ffff"],
    }.items(),
)
def test_errors_tell_what_is_wrong(read, case, expected):
    error = read[1]["errors"][case] or "no error"
    assert error.startswith(expected[0]) and all(part in error for part in expected), error


def test_pairs_come_back(read, folder):
    back, here = datasets.load_from_disk(folder / "pairs"), make_pairs(6)
    assert back.features == here.features and back["caption"][:] == here["caption"][:]
    assert [image.tobytes() for image in back["real_image"]] == [image.tobytes() for image in here["real_image"]]


def test_offline_from_the_cache(run, published, read):
    tensors, answers = run("offline", "reader", HF_HUB_OFFLINE="1")
    for name in ("whole", "adapters"):
        assert_same_outputs(tensors, name, published[0], atol=0, rtol=0)
    assert answers["org/gmail-adapters"] == read[1]["org/gmail-adapters"]
    assert answers["unseen"].startswith("OSError: We couldn't connect")


def test_a_base_that_was_converted_by_the_hub(run):
    """A pickle on main, safetensors in a pull request."""
    tensors, answers = run("converted", "author")
    assert_same_outputs(tensors, "again", tensors, atol=0, rtol=0)
    assert answers["revision"] == answers["evaluated"] == commit_id(2)
    assert answers["pickle"].startswith("OSError: 'org/pickle' has no safetensors weights at revision 0")


def test_without_gmail_hf(run, published, read):
    tensors, answers = run("without_gmail_hf", "stranger")
    assert answers["import"].startswith("ModuleNotFoundError") and not answers["imported"]
    expected = published[0]
    assert torch.equal(tensors["clip.real"], expected["real"])
    for name in ("peft.gen", "merged.gen", "merged.logits_gen"):
        torch.testing.assert_close(tensors[name], expected[name.partition(".")[2]], atol=1e-5, rtol=1e-5)
    assert [entry["label"] for entry in answers["merged"]]


# Without a Hub


def test_adapters_alone_in_a_folder(clip_folder, tmp_path):
    fields = {"trainable_modalities": ["real", "gen"], "text_lora": True, "lora_rank": 2}
    model = make_model(clip_folder, **fields)
    model.save_adapters(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    back = GmailCLIPModel.from_pretrained(tmp_path)
    assert back.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for name in ("dtype", "torch_dtype"):  # the latter of older scripts
        assert GmailCLIPModel.from_pretrained(tmp_path, **{name: torch.bfloat16}).dtype == torch.bfloat16


@pytest.mark.parametrize("part", [GmailCLIPModel, GmailVisionModel, GmailVisionModelWithProjection])
@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_use_safetensors_may_be_asked_for(model, tmp_path, part, kind):
    (model.save_pretrained if kind == "whole" else model.save_adapters)(tmp_path)
    loaded, expected = part.from_pretrained(tmp_path, use_safetensors=True), part.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("part", [GmailVisionModel, GmailVisionModelWithProjection])
def test_adapters_alone_give_the_towers_too(clip_folder, tmp_path, part):
    model = make_model(clip_folder, trainable_modalities=["real", "gen"])
    model.save_adapters(tmp_path / "adapters")
    model.save_pretrained(tmp_path / "whole")
    expected = part.from_pretrained(tmp_path / "whole")
    back, info = part.from_pretrained(tmp_path / "adapters", output_loading_info=True)
    assert back.name_or_path == expected.name_or_path.replace("whole", "adapters")
    assert type(back) is part and not info["missing_keys"] and back.training == expected.training
    assert {name: parameter.requires_grad for name, parameter in back.named_parameters()} == {
        name: parameter.requires_grad for name, parameter in expected.named_parameters()
    }
    assert back.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_adapters_do_not_go_beside_weights_that_hide_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="has a complete checkpoint.*`save_pretrained`"):
        randomise(model).save_adapters(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_adapters_whose_base_is_not_there(clip_folder, tmp_path):
    model = make_model(clip_folder)
    with pytest.raises(ValueError, match="Others cannot download the base"):
        model.save_adapters(tmp_path, push_to_hub=True, repo_id="org/gmail")
    model.config.base_model_name_or_path = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="Others cannot download the base"):
        model.save_adapters(tmp_path, push_to_hub=True, repo_id="org/gmail")
    model.config.base_model_name_or_path = None
    model.save_adapters(tmp_path)
    with pytest.raises(ValueError, match="names no base.*`from_base`.*`load_adapters`"):
        GmailCLIPModel.from_pretrained(tmp_path)
    model.config.base_model_name_or_path = str(tmp_path / "gone")
    model.save_adapters(tmp_path)
    with pytest.raises(OSError, match="contains only adapters, and their base '.*gone' could not be loaded"):
        GmailCLIPModel.from_pretrained(tmp_path)


def test_base_with_another_text_encoder_is_another_base(clip_folder, tmp_path):
    model = make_model(clip_folder)
    model.save_adapters(tmp_path)
    with torch.no_grad():
        model.text_model.load_state_dict(make_clip(seed=9).text_model.state_dict())
    with pytest.raises(ValueError, match="with other weights"):
        model.load_adapters(tmp_path)


def test_own_benchmarks_by_hub_id(run):
    answers = run("benchmarks", "reader_of_benchmarks")[1]
    assert answers["labels"] == [1, 0, 1] and answers["same"] == [True] * 3
    assert answers["prompts"] == [[["a photo of a cat."], ["a photo of a red fox."]]]
    assert answers["captions"] == [["a cat"], ["a dog"], ["a fox"]]
    assert re.fullmatch("[0-9a-f]{40}", answers["revision"])


def test_images_at_addresses(run, folder):
    """`hf://`, `http://` and `zip://`, wherever images may be named."""
    answers = run("addresses", "reader_of_images")[1]
    assert answers["decoded"] == answers["kept"] == [True] * 5 and answers["left_out"] == [True] * 6
    assert all(re.match("BadImageError: .*cannot be read", error) for error in answers["errors"]), answers["errors"]
    assert answers["referenced"]
    assert answers["paths"] == ["0.png"] * 5
    assert answers["columns"].startswith("Image(") and answers["batch"] == [5, 6]
