"""Model cards: the numbers in them are those of the files, the snippets run, and nobody's own text is lost."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from peft import PeftModel
from server import HubServer
from tiny import make_model, make_pairs, make_processor, picture
from transformers import CLIPModel, TrainerCallback

from gmail_hf import GmailCLIPModel, GmailTrainer
from gmail_hf.publishing import add_results, model_card, write_card
from gmail_hf.publishing.marker import written_here
from gmail_hf.publishing.provenance import provenance, source
from gmail_hf.publishing.results import NOT_RUN

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
DIGITS = CARDS / "gmail-digits"  # with the files of a training and an evaluation
TEXTS = Features(dict.fromkeys(("caption", "generator", "generator_revision"), Value("string")))
TODO = re.compile(r"\b(None|nan|undefined|More Information Needed)\b")


def table(text: str, title: str) -> dict[str, list[str]]:
    """The rows of the first table with that first cell of the header, by first cell."""
    lines = text.split(f"| {title} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", CARDS / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_cards_are_what_the_code_renders(render, tmp_path):
    render.render(tmp_path)
    rendered = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("README.md")}
    committed = {path.relative_to(CARDS): path.read_text() for path in CARDS.glob("*/README.md")}
    assert committed == rendered and len(committed) == 7


@pytest.mark.parametrize("path", sorted(CARDS.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_metadata_survives_the_hubs_own_classes(path):
    card = ModelCard.load(path)
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert front["library_name"] and front["pipeline_tag"] and front["tags"]
    if card.data.eval_results:
        assert eval_results_to_model_index(card.data.model_name, card.data.eval_results) == front["model-index"]
    assert str(card) == path.read_text()


@pytest.mark.parametrize("name", ["coco", "cc3m", "cc12m"])
def test_card_of_a_recipe_has_every_setting_and_no_score(render, name):
    config = ROOT / "examples" / "configs" / f"{name}.yaml"
    text, settings = str(render.planned_card(config)), yaml.safe_load(config.read_text())
    told = {key.strip("`"): cells[0] for key, cells in table(text, "setting").items()}
    for key in told.keys() & settings.keys():
        assert told[key] == str(settings[key]) or float(told[key]) == float(settings[key])
    assert {"learning_rate", "max_steps", "lora_rank", "bf16", "per_device_train_batch_size"} <= told.keys()
    assert int(told["processes"]) * int(told["per_device_train_batch_size"]) == 256
    assert NOT_RUN in text and "This recipe has not been run yet" in text and "model-index" not in text
    assert settings["model"] in text and settings["dataset"] in text
    assert not TODO.search(text)


def test_numbers_are_those_of_the_files():
    text = (DIGITS / "README.md").read_text()
    measured = json.loads((DIGITS / "all_results.json").read_text())
    result = json.loads((DIGITS / "digits.json").read_text())
    scores = table(text, "score")
    assert scores["paired cosine"] == [
        f"{measured['before_paired_cosine']:.3f}",
        f"{measured['eval_paired_cosine']:.3f}",
    ]
    assert table(text, "cost")["parameters trained"] == [f"{measured['trained_parameters']:,}"]
    top1 = result["tasks"]["zero_shot"]
    low, high = top1["intervals"]["top1"]
    assert f"| top-1 | {top1['scores']['top1']:.3f} | {low:.3f} to {high:.3f} |" in text
    entries = {
        (entry.task_type, entry.dataset_split, entry.metric_type): entry.metric_value
        for entry in ModelCard(text).data.eval_results
    }
    assert entries["zero-shot-image-classification", "test", "accuracy"] == round(top1["scores"]["top1"], 4)
    key = ("image-feature-extraction", "validation", "paired_cosine")
    assert entries[key] == round(measured["eval_paired_cosine"], 4)
    assert len(entries) == sum(len(task["scores"]) for task in result["tasks"].values()) + 5
    assert not TODO.search(text) and str(ROOT) not in text


def test_without_results_there_are_no_numbers(tmp_path, clip_folder):
    make_model(clip_folder).save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert NOT_RUN in text and "| cost |" not in text and "| score |" not in text and "model-index" not in text
    assert "not saved by `GmailTrainer`" in text and "Trained on" not in text
    assert "base_model:" not in text and str(clip_folder) not in text  # a folder of this machine
    assert not TODO.search(text)


def test_results_are_added_and_replaced_and_the_rest_stays(tmp_path):
    before = model_card(DIGITS)
    before.text = before.text.replace("## Limits", "My own words.\n\n## Limits")
    before.save(tmp_path / "README.md")
    card = add_results(tmp_path / "README.md", DIGITS)
    assert (tmp_path / "README.md").read_text() == str(card)
    again = add_results(tmp_path, DIGITS)
    assert str(again) == str(card)  # replaced, not doubled
    assert NOT_RUN not in card.text and "My own words." in card.text
    outside = re.compile(r"<!-- scores.*<!-- end", re.DOTALL)
    assert outside.sub("", card.text) == outside.sub("", before.text)

    own = ModelCard("---\nlicense: mit\nmodel-index:\n- name: mine\n  results: []\n---\n# Mine\n")
    own.save(tmp_path / "own.md")
    card = add_results(tmp_path / "own.md", DIGITS)
    assert card.text.startswith("# Mine\n") and card.text.count("## Results") == 1
    assert card.data.license == "mit" and "top-1" in card.text
    with pytest.raises(FileNotFoundError, match="has no results"):
        add_results(tmp_path, CARDS / "gmail-coco")
    with pytest.raises(FileNotFoundError, match="No card"):
        add_results(tmp_path / "nowhere", DIGITS)


def test_card_of_a_clip_has_no_score_of_its_captioner(tmp_path):
    result = json.loads((DIGITS / "digits.json").read_text())
    model_card(DIGITS).save(tmp_path / "expected.md")
    expected = add_results(tmp_path / "expected.md", DIGITS)
    captioner, written = {"image-text-to-text": {"name": "org/clipcap"}}, {"captioning": result["tasks"]["zero_shot"]}
    for name, models, tasks in (
        ("digits", {**result["models"], **captioner}, {**result["tasks"], **written}),
        ("coco", captioner, written),
    ):
        changed = {**result, "benchmark": name, "models": models, "tasks": tasks}
        (tmp_path / f"{name}.json").write_text(json.dumps(changed))
    model_card(DIGITS).save(tmp_path / "README.md")
    assert str(add_results(tmp_path, tmp_path)) == str(expected)
    (tmp_path / "digits.json").unlink()  # a captioner by itself, whose card gets its scores
    assert "image-to-text" in str(add_results(tmp_path, tmp_path))


def test_card_of_a_captioner_has_no_score_of_another_model(tmp_path):
    result = json.loads((DIGITS / "digits.json").read_text())
    captioner, written = {"image-text-to-text": {"name": "org/clipcap"}}, {"captioning": result["tasks"]["zero_shot"]}
    changed = {**result, "benchmark": "coco", "models": captioner, "tasks": written}
    (tmp_path / "coco.json").write_text(json.dumps(changed))
    ModelCard("---\nlicense: mit\n---\n# Captioner\n").save(tmp_path / "README.md")
    expected = str(add_results(tmp_path, tmp_path, "org/clipcap"))
    shutil.copy(DIGITS / "digits.json", tmp_path)
    assert str(add_results(tmp_path, tmp_path, "org/clipcap")) == expected and "image-to-text" in expected
    with pytest.raises(FileNotFoundError, match="has no results of 'org/other' from .*: evaluate the model first"):
        add_results(tmp_path, tmp_path, "org/other")


@pytest.fixture
def trained(clip_folder, arguments):
    trainer = GmailTrainer(
        model=make_model(clip_folder),
        args=arguments(max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1),
        train_dataset=make_pairs(8),
        eval_dataset=make_pairs(12, seed=100),
        processing_class=make_processor(),
    )
    trainer.train()
    return trainer


def test_trainer_writes_the_card(trained):
    folder = Path(trained.args.output_dir)
    assert written_here((folder / "checkpoint-2" / "README.md").read_text())
    trained.save_model()
    trained.create_model_card(
        tags="mine", license="mit", dataset="org/pairs", model_name="Two branches", finetuned_from="x"
    )
    card = ModelCard.load(folder / "README.md")
    assert "\n# Two branches\n" in card.text
    assert card.data.license == "mit" and "mine" in card.data.tags and card.data.datasets == ["org/pairs"]
    last = [entry for entry in trained.state.log_history if "eval_loss" in entry][-1]
    assert table(card.text, "score")["loss"] == ["–", f"{last['eval_loss']:.3f}"]
    assert {entry.metric_type: entry.metric_value for entry in card.data.eval_results}["paired_cosine"] == round(
        last["eval_paired_cosine"], 4
    )
    told = table(card.text, "setting")
    assert told["`max_steps`"] == ["2"] and told["`learning_rate`"] == ["0.01"]
    rows = table(card.text, "kind")
    assert rows["training pairs, their captions"][2] == "8" and rows["evaluation pairs"][2] == "12"
    assert not TODO.search(card.text) and str(folder.parent) not in str(card)


def scores_told(folder) -> dict[str, list[str]]:
    text = Path(folder, "README.md").read_text()
    return table(text, "score") if "| score |" in text else {}


class StopAfterThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize("best", [False, True])
def test_scores_are_of_the_weights_that_were_saved(clip_folder, arguments, best):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    if best:  # the number of the step rises: the first is the best
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_step", "greater_is_better": False}
    trainer = GmailTrainer(
        model=make_model(clip_folder),
        args=arguments(max_steps=4, **settings),
        train_dataset=make_pairs(8),
        eval_dataset=make_pairs(12, seed=100),
        processing_class=make_processor(),
        compute_metrics=lambda prediction: {"step": float(trainer.state.global_step)},
        callbacks=None if best else [StopAfterThree()],
    )
    trainer.train()
    trainer.save_model()
    told = scores_told(trainer.args.output_dir)
    assert told["step"] == ["–", "2.000"] if best else not told  # nothing was measured after step 3
    measured = trainer.evaluate()
    trainer.create_model_card()
    assert scores_told(trainer.args.output_dir)["loss"] == ["–", f"{measured['eval_loss']:.3f}"]


def test_scores_of_an_earlier_run_in_the_folder_are_not_told(trained, train):
    folder = Path(trained.args.output_dir)
    metrics = trained.evaluate()
    for name in ("before", "eval"):
        trained.save_metrics(name, {key.replace("eval", name): value for key, value in metrics.items()})
    trained.save_metrics("train", trained.state.log_history[-2])
    with pytest.raises(FileNotFoundError, match="save the model first"):
        trained.create_model_card()
    trained.save_model()
    assert scores_told(folder)["loss"] == [f"{metrics['eval_loss']:.3f}"] * 2
    other = train(max_steps=1)
    other.save_model()
    assert str(folder) == other.args.output_dir and not scores_told(folder)
    text = (folder / "README.md").read_text()
    assert (
        "model-index" not in text
        and table(text, "cost")["seconds"][0] == f"{other.state.log_history[-1]['train_runtime']:,.4g}"
    )


def test_nothing_is_told_of_other_weights(trained, clip_folder):
    folder = Path(trained.args.output_dir)
    trained.save_model()
    told = (folder / "README.md").read_text()
    assert scores_told(folder) and "Trained on" in told
    GmailCLIPModel.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == told  # the same weights
    other = make_model(clip_folder, lora_rank=2)
    other.save_pretrained(folder)
    for _ in range(2):
        text = (folder / "README.md").read_text()
        assert not scores_told(folder) and "Trained on" not in text and "| cost |" not in text and "saved by" in text
        (folder / "README.md").unlink()
        other.save_pretrained(folder)


def test_part_of_a_training_is_not_told_as_the_whole(train):
    train(max_steps=4, save_strategy="steps", save_steps=2)
    resumed = train(max_steps=4, resume=True)
    resumed.save_model()
    text = Path(resumed.args.output_dir, "README.md").read_text()
    assert "Trained on" in text and "| seconds |" not in text and "mean training loss" not in text


def test_own_card_is_left_alone(trained):
    trained.save_model()
    readme = Path(trained.args.output_dir, "README.md")
    assert written_here(readme.read_text())
    for mine in ("# Mine", readme.read_text().replace("## Limits", "## My limits")):
        readme.write_text(mine)
        trained.save_model()
        trained.create_model_card()
        assert readme.read_text() == mine
    readme.write_bytes(b"# M\xfcller")  # not UTF-8
    trained.save_model()
    assert readme.read_bytes() == b"# M\xfcller"


def test_saving_leaves_a_card_where_there_is_none(clip_folder, tmp_path):
    model = make_model(clip_folder)
    (tmp_path / "README.md").write_text("# Mine")
    model.save_pretrained(tmp_path)
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine"
    model.config.base_model_name_or_path, model.config.base_model_revision = "org/clip", "abc"
    model.save_adapters(tmp_path / "adapters")
    text = (tmp_path / "adapters" / "README.md").read_text()
    assert 'CLIPModel.from_pretrained("org/clip", revision="abc")' in text and "base_model: org/clip" in text


def test_pairs_from_several_sources_are_named_after_none(tmp_path, clip_folder):
    def cached(repo, generator):
        folder = tmp_path / repo / "default" / "0.0.0" / ("a" * 40)
        columns = {"caption": ["a cat"], "generator": [generator], "generator_revision": ["1" if generator else None]}
        folder.mkdir(parents=True)
        with ArrowWriter(path=str(folder / "data.arrow"), features=TEXTS) as writer:
            writer.write_table(Dataset.from_dict(columns, TEXTS).data.table)
            writer.finalize()
        return Dataset.from_file(str(folder / "data.arrow"))

    def found(rows):
        return provenance(make_model(clip_folder).config, {"train_dataset": rows}, 1)["datasets"]["train_dataset"]

    ours, theirs = cached("org___ours", "painter"), cached("org___theirs", None)
    assert found(ours)["name"] == "org/ours"
    both = found(concatenate_datasets([ours, theirs]))
    assert (both["name"], both["pairs"]) == (None, 2)
    assert [generator["name"] for generator in both["generators"]] == ["painter"]


def test_generators_and_rows_are_told(clip_folder, arguments):
    pairs = make_pairs(4)
    names = {"generator": ["org/sd", "org/sd", "org/flux", "org/sd"], "generator_revision": ["a", "a", "b", "a"]}
    for name, values in names.items():
        pairs = pairs.add_column(name, values)
    trainer = GmailTrainer(make_model(clip_folder), arguments(), pairs, processing_class=make_processor())
    told = trainer.provenance["datasets"]["train_dataset"]
    assert [(entry["name"], entry["revision"]) for entry in told["generators"]] == [("org/flux", "b"), ("org/sd", "a")]
    assert told["pairs"] == 4 and trainer.provenance["base"]["name"] == Path(clip_folder).name


@pytest.mark.parametrize(
    "front",
    ["license: [mit", "on: x\nlicense: mit", "- mit", "license:\n- mit\n- other", "license: other\nlicense_name: own"],
)
def test_licence_of_a_base_with_any_card(tmp_path, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert source(str(tmp_path))["license"] == ("other" if front.startswith("license: other") else None)
    assert source("org/nowhere")["license"] is None and source("digits")["license"] is None


# Snippets


@pytest.fixture(scope="module")
def snippet_folder(tmp_path_factory, clip_folder):
    folder = tmp_path_factory.mktemp("snippets")
    make_model(clip_folder).save_pretrained(folder / "org" / "gmail-coco")
    make_processor().save_pretrained(folder / "org" / "gmail-coco")
    picture(0).save(folder / "photograph.png")
    picture(1).save(folder / "generated.png")
    return folder


def test_snippets_run(render, snippet_folder, monkeypatch):
    monkeypatch.chdir(snippet_folder)
    check_snippets(render.planned_card(ROOT / "examples" / "configs" / "coco.yaml").text, "gmail-coco-merged")


def test_snippets_of_adapters_run(snippet_folder, clip_folder, tmp_path, monkeypatch):
    """The base's repository has the processor, which `save_adapters` does not write."""
    monkeypatch.chdir(snippet_folder)
    CLIPModel.from_pretrained(clip_folder).save_pretrained("org/clip")
    make_processor().save_pretrained("org/clip")
    make_model("org/clip").save_adapters("org/adapters")
    monkeypatch.chdir(tmp_path)  # here org/clip is not a folder, so it is an id of the Hub
    text = model_card(snippet_folder / "org" / "adapters", "org/adapters").text
    monkeypatch.chdir(snippet_folder)
    check_snippets(text, "adapters-merged")


def check_snippets(text: str, merged_folder: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 4
    variables: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), variables)
    assert isinstance(variables["adapted"], PeftModel) and len(variables["labels"]) == 2
    merged = CLIPModel.from_pretrained(merged_folder)
    pixel_values = variables["pixel_values"][1:]
    with torch.no_grad():
        through_gen = variables["embeds"][1:]
        for model in (merged, variables["adapted"]):
            torch.testing.assert_close(model.get_image_features(pixel_values).pooler_output, through_gen)


# A Hub of our own

CLIENT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from datasets import load_dataset
from huggingface_hub import HfApi
from tiny import make_pairs, make_processor
from gmail_hf import GmailCLIPModel, GmailTrainer, GmailTrainingArguments

folder = Path(sys.argv[2])
api = HfApi()
for repo, kind, path in (("org/clip", "model", sys.argv[3]), ("org/pairs", "dataset", folder / "pairs")):
    api.create_repo(repo, repo_type=kind)
    api.upload_folder(repo_id=repo, repo_type=kind, folder_path=path)
pairs = load_dataset("org/pairs", split="train")
model = GmailCLIPModel.from_clip("org/clip")
settings = dict(max_steps=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=1, use_cpu=True)
settings |= dict(eval_strategy="steps", eval_steps=2, report_to="none", hub_always_push=True, push_to_hub=True)
args = GmailTrainingArguments(output_dir=str(folder / "run"), hub_model_id="org/gmail", **settings)
trainer = GmailTrainer(model, args, pairs, pairs, processing_class=make_processor())
trainer.train()
trainer.push_to_hub()
GmailCLIPModel.from_pretrained("org/gmail").push_to_hub("org/gmail", tags=["mine"])
GmailCLIPModel.from_pretrained("org/gmail").save_pretrained(folder / "copy", push_to_hub=True, repo_id="org/gmail")
api.upload_file(path_or_fileobj=b"# Written on the Hub", path_in_repo="README.md", repo_id="org/gmail")
trainer.push_to_hub()
model = GmailCLIPModel.from_pretrained("org/gmail")
model.push_to_hub("org/gmail")
make_processor().push_to_hub("org/again")  # transformers leaves an empty form
model.push_to_hub("org/again", tags=["mine"])
model.save_pretrained(folder / "third", push_to_hub=True, repo_id="org/third")
api.upload_file(path_or_fileobj=b"# Third", path_in_repo="README.md", repo_id="org/third")
model.save_pretrained(folder / "third", push_to_hub=True, repo_id="org/third")
"""


@pytest.mark.integration
def test_push_while_training_and_after(tmp_path, clip_folder):
    make_pairs(12).to_parquet(tmp_path / "pairs" / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "pairs" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    base = tmp_path / "base"
    CLIPModel.from_pretrained(clip_folder).save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    with HubServer() as hub:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(Path(__file__).parents[1]), str(tmp_path), str(base)],
            env={**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        commits = hub.commits["model", "org/gmail"]
        # Two checkpoints, the end, the user's own card, the end again.
        assert len(commits) >= 5 and "model.safetensors" in commits[1] and "gen/adapter_config.json" in commits[1]
        pushed = {path for commit in commits for path in commit}
        assert not [path for path in pushed if path.endswith((".bin", ".pt", ".pth"))]
        assert not [path for path in pushed if path.startswith("checkpoint")]
        cards = [hub.contents[commit["README.md"]].decode() for commit in commits if "README.md" in commit]
        again = ModelCard(hub.files("org/again", "model")["README.md"].decode())
        third = [hub.contents[commit["README.md"]].decode() for commit in hub.commits["model", "org/third"][1:]]
    assert cards[-2:] == ["# Written on the Hub"] * 2
    form = hub.contents[hub.commits["model", "org/again"][1]["README.md"]].decode()
    assert "[More Information Needed]" in form
    assert written_here(str(again)) and 'from_pretrained("org/again")' in again.text
    assert "mine" in again.data.tags and again.data.base_model == "org/clip"
    assert 'from_pretrained("org/third")' in third[0] and third[1:] == ["# Third"] * 2
    card = ModelCard(next(text for text in reversed(cards) if written_here(text)))
    assert card.data.base_model == "org/clip" and card.data.datasets == ["org/pairs"] and "mine" in card.data.tags
    assert card.data.license == "mit" and 'from_pretrained("org/gmail")' in card.text
    rows = table(card.text, "kind")
    assert rows["training pairs, their captions"] == ["`org/pairs`, split `train`", f"{1:040x}", "12", "cc-by-4.0"]
    assert rows["base model"][1] == f"{1:040x}"
    assert card.data.eval_results[0].dataset_revision == f"{1:040x}"


@pytest.mark.parametrize(("strategy", "pushes"), [("every_save", 2), ("end", 0)])
def test_hub_strategy(train, monkeypatch, strategy, pushes):
    uploads = []

    def upload(self, repo_id, operations, commit_message, run_as_future, **kwargs):
        uploads.append(commit_message)
        future = Future()
        future.set_result(None)
        return future

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", upload)
    monkeypatch.setattr("gmail_hf.publishing.model_cards.card_of_others", lambda *args, **kwargs: None)

    def init_hf_repo(self, *args, **kwargs):
        self.hub_model_id, self.push_in_progress = "org/model", None

    monkeypatch.setattr(GmailTrainer, "init_hf_repo", init_hf_repo)
    train(max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True, hub_strategy=strategy)
    assert uploads == [f"Training in progress, step {step}" for step in (1, 2)[:pushes]]


def test_pushing_the_state_of_a_training_is_refused(clip_folder, arguments):
    args = arguments(push_to_hub=True, hub_strategy="checkpoint")
    with pytest.raises(ValueError, match="pickle. Use 'every_save'"):
        GmailTrainer(make_model(clip_folder), args, make_pairs(4), processing_class=make_processor())
