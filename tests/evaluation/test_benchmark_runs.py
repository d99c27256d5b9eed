"""What can be measured with which model, results that are kept, and the reports made of them."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_data import question, write_captions, write_classes
from datasets import Dataset, Image
from tiny import make_pairs
from transformers import CLIPModel

from gmail_hf import GmailCLIPModel
from gmail_hf.commands.bundled import get_benchmark
from gmail_hf.digits import llama_path
from gmail_hf.evaluation import (
    Settings,
    captioning,
    finished,
    load_model,
    plan,
    provenance,
    results_in,
    run,
    runner,
    to_html,
    to_markdown,
)
from gmail_hf.evaluation.report import tabulate
from gmail_hf.metrics.environment import PACKAGES, environment

SETTINGS = Settings(batch_size=4, num_beams=1)


@pytest.fixture
def planned(source, loaded):
    """`planned("dtd", folder, "gmail")`: the plan of that benchmark."""

    def make(name, place=None, model="gmail", captioner=None, limit=None, settings=SETTINGS):
        found = source(name, place, limit)
        return plan(get_benchmark(name), found, loaded[model], captioner and loaded[captioner], settings)

    return make


@pytest.fixture
def fake_scores(monkeypatch):
    """Caption scores without Java; METEOR is missing until `available` says otherwise."""
    missing = {"METEOR": "Java is missing; install it"}
    names = ("BLEU@4", "METEOR")
    monkeypatch.setattr(captioning, "METRICS", names)
    monkeypatch.setattr(
        captioning, "caption_metrics", lambda *args: {name: None if name in missing else 0.25 for name in names}
    )
    for module in (captioning, runner):
        monkeypatch.setattr(
            module, "missing_metrics", lambda metrics, vectors: {m: missing[m] for m in metrics if m in missing}
        )
    return missing


def test_tasks_are_those_that_the_models_can_do(planned, tmp_path):
    classes, captions = write_classes(tmp_path / "classes"), write_captions(tmp_path / "captions", [["a"], ["b"]])
    assert list(planned("dtd", classes).tasks) == ["zero_shot"]
    assert list(planned("coco", captions).tasks) == ["retrieval"]
    assert list(planned("coco", captions, "clipcap").tasks) == ["captioning"]
    both = planned("coco", captions, "gmail", "clipcap")
    assert {task: chosen.name.split("/")[-1] for task, chosen in both.tasks.items()} == {
        "retrieval": "gmail",
        "captioning": "clipcap",
    }
    assert list(planned("digits", None, "gmail", "clipcap", limit=10).tasks) == [
        "retrieval",
        "zero_shot",
        "captioning",
        "alignment",
    ]


def test_adapters_saved_without_a_processor_take_that_of_their_base(loaded, tmp_path):
    loaded["gmail"].model.to_clip("real").save_pretrained(tmp_path / "clip")
    loaded["gmail"].processor.save_pretrained(tmp_path / "clip")
    GmailCLIPModel.from_clip(tmp_path / "clip").save_adapters(tmp_path / "adapters")
    processor = load_model(str(tmp_path / "adapters")).processor
    assert processor.to_dict() == load_model(str(tmp_path / "clip")).processor.to_dict()


def test_models_that_do_not_fit_are_refused(planned, loaded, model_folders, tmp_path):
    classes = write_classes(tmp_path / "classes")
    with pytest.raises(ValueError, match="dtd needs a CLIP, but .*llava' is not one"):
        planned("dtd", classes, "llava")
    with pytest.raises(ValueError, match=r"gmail' has no branch 'fake'; it has \['real', 'gen'\]"):
        planned("dtd", classes, settings=Settings("fake"))
    with pytest.raises(ValueError, match="needs a --limit of 10 or more"):
        planned("digits", limit=5)
    loaded["gmail"].model.to_clip("real").save_pretrained(tmp_path / "clip")
    loaded["gmail"].processor.save_pretrained(tmp_path / "clip")
    clip = load_model(str(tmp_path / "clip"))
    assert type(clip.model) is CLIPModel and clip.embeds
    clip.check_modality("real")
    with pytest.raises(ValueError, match=r"clip' has no branch 'gen'; it has \['real'\]"):
        clip.check_modality("gen")
    with pytest.raises(ValueError, match="clipcap' has no branch 'fake'"):
        loaded["clipcap"].check_modality("fake")
    with pytest.raises(FileNotFoundError, match="No model at 'gmail-nowhere'"):
        load_model("gmail-nowhere")
    with pytest.raises(ValueError, match="has the model type 'llama', .* or an image-text-to-text model"):
        load_model(llama_path())


def test_a_captioner_cannot_answer_questions(planned, source, tmp_path):
    Dataset.from_list([question(0)]).cast_column("image", Image()).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="scienceqa needs a model with a chat template, but .*clipcap' has none"):
        planned("scienceqa", tmp_path / "test.parquet", "clipcap")
    with pytest.raises(ValueError, match="scienceqa needs an image-text-to-text model"):
        planned("scienceqa", tmp_path / "test.parquet", "gmail")
    assert list(planned("scienceqa", tmp_path / "test.parquet", "gmail", "llava").tasks) == ["vqa"]


def test_a_finished_benchmark_is_known_and_another_run_is_not_mixed_in(planned, source, tmp_path):
    classes, out = write_classes(tmp_path / "classes"), tmp_path / "out"
    first = planned("dtd", classes)
    assert finished(first, SETTINGS, out) is None
    result = run(first, SETTINGS, out)
    assert json.loads((out / "dtd.json").read_text()) == result
    assert finished(first, Settings(batch_size=1, num_beams=1), out) == result
    assert results_in(out) == [result]
    assert not list(out.rglob("*.part"))
    with pytest.raises(FileExistsError, match="settings.modality: real -> gen"):
        finished(first, Settings("gen", num_beams=1), out)
    with pytest.raises(FileExistsError, match="dataset.limit: None -> 3"):
        finished(planned("dtd", classes, limit=3), SETTINGS, out)
    half = replace(first.tasks["zero_shot"], model=deepcopy(first.tasks["zero_shot"].model).bfloat16())
    with pytest.raises(FileExistsError, match="models.clip.dtype: float32 -> bfloat16"):
        finished(replace(first, tasks={"zero_shot": half}), SETTINGS, out)
    # Nor are models or settings in one report; what another benchmark does not take part in may differ.
    captions = write_captions(tmp_path / "captions", [["a"], ["b"]])
    assert finished(planned("coco", captions, "gmail", "clipcap", limit=1), SETTINGS, out) is None
    with pytest.raises(FileExistsError, match="dtd.json' is the result of another run .*settings.seed: 0 -> 1"):
        finished(planned("coco", captions), Settings(num_beams=1, seed=1), out)
    (classes / "classnames.txt").write_text("cat\ndog\nfish\n")
    with pytest.raises(FileExistsError, match="dataset.revision: files [0-9a-f]+ -> files [0-9a-f]+"):
        finished(planned("dtd", classes), SETTINGS, out)


def test_an_interrupted_benchmark_leaves_no_result(planned, tmp_path, monkeypatch):
    first = planned("dtd", write_classes(tmp_path / "classes"))
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(first, SETTINGS, tmp_path / "out")
    assert finished(first, SETTINGS, tmp_path / "out") is None and results_in(tmp_path / "out") == []


def test_a_bad_generated_image_stops_a_benchmark_before_captioning(planned, tmp_path, monkeypatch):
    make_pairs(12, bad_generated=(3,)).to_parquet(tmp_path / "pairs.parquet")
    first, done = planned("coco", tmp_path / "pairs.parquet", "gmail", "clipcap"), []
    assert list(first.tasks) == ["retrieval", "captioning", "alignment"]
    for task in ("retrieval", "captioning"):
        monkeypatch.setitem(runner.EVALUATORS, task, lambda *args: done.append(args))
    with pytest.raises(ValueError, match="generated_image: image 3: .* cannot be read"):
        run(first, SETTINGS, tmp_path / "out")
    assert not done


def test_models_in_folders_of_one_name_are_all_listed(planned, tmp_path):
    first = planned("dtd", write_classes(tmp_path / "classes"))
    result = run(first, SETTINGS, tmp_path / "out")
    models = [{"name": f"/{place}/gmail", "revision": f"files {place}", "dtype": "float32"} for place in "ab"]
    result["models"] = {"clip": models[0], "CLIPScore": models[1]}
    page = to_html([result], tmp_path / "out")
    assert page.count("files a") == page.count("files b") == 2  # above the results, and how they were measured
    assert "/a/gmail" not in page


def test_what_was_missing_is_measured_once_it_can_be(planned, tmp_path, fake_scores):
    captions = write_captions(tmp_path / "captions", [["a red one"], ["a blue two"]])
    first = planned("coco", captions, "gmail", "clipcap")
    result = run(first, SETTINGS, tmp_path / "out")
    assert result["tasks"]["captioning"]["scores"]["METEOR"] is None
    assert finished(first, SETTINGS, tmp_path / "out") is not None
    markdown, html = to_markdown([result]), to_html([result], tmp_path / "out")
    assert "| COCO | Captions | METEOR | – | – | Java is missing; install it |" in markdown
    assert 'class="why">Java is missing; install it</small>' in html
    fake_scores.clear()
    assert finished(first, SETTINGS, tmp_path / "out") is None
    again = run(first, SETTINGS, tmp_path / "out")
    assert again["tasks"]["captioning"]["scores"]["METEOR"] == 0.25


def test_the_clip_of_clip_scores_is_named(planned, loaded, tmp_path, fake_scores):
    first, out = planned("coco", write_captions(tmp_path / "captions", [["a"], ["b"]]), "clipcap"), tmp_path / "out"
    settings = replace(SETTINGS, clip_scorer=loaded["gmail"])
    result = run(first, settings, out)
    named = result["models"]["CLIPScore"]
    assert named["name"] == loaded["gmail"].name and "its vision tower is the one" in named["note"]
    assert finished(first, settings, out) == result
    markdown, html = to_markdown([result]), to_html([result], out)
    assert "| COCO | Captions | CLIPScore | " in markdown and "| RefCLIPScore | " in markdown
    assert Path(named["name"]).name in html and named["note"] in html
    with pytest.raises(FileExistsError, match="models.CLIPScore.name: .*gmail -> None"):
        finished(first, SETTINGS, out)
    without = run(first, SETTINGS, tmp_path / "without")
    assert "| COCO | Captions | CLIPScore | – | – | name a CLIP by --clip_score_model" in to_markdown([without])
    assert finished(first, SETTINGS, tmp_path / "without") == without


def test_a_score_that_failed_is_missing_and_not_tried_again(planned, tmp_path, fake_scores, monkeypatch):
    monkeypatch.setattr(captioning, "caption_metrics", lambda *args: {"BLEU@4": 0.5, "METEOR": None})
    fake_scores.clear()  # nothing is known to be missing
    first = planned("coco", write_captions(tmp_path / "captions", [["a"], ["b"]]), "clipcap")
    result = run(first, SETTINGS, tmp_path / "out")
    row = "| COCO | Captions | METEOR | – | – | it failed; see the warning in the run's output |"
    assert row in to_markdown([result])
    assert finished(first, SETTINGS, tmp_path / "out") == result


def test_a_result_tells_where_it_comes_from(planned, loaded, tmp_path):
    first = planned("dtd", write_classes(tmp_path / "classes"), limit=5)
    result = run(first, SETTINGS, tmp_path / "out")
    gmail = loaded["gmail"]
    assert result["models"] == {"clip": {"name": gmail.name, "revision": gmail.revision, "dtype": "float32"}}
    assert result["dataset"] == {
        "name": str(tmp_path / "classes"),
        "revision": first.source.revision,
        "split": "test",
        "limit": 5,
    }
    assert result["settings"] == {"modality": "real", "seed": 0, "num_beams": 1, "word_vectors": None}
    assert set(result["environment"]["packages"]) == set(PACKAGES) and result["environment"]["packages"]["torch"]
    assert set(environment()) == {"date", "machine", "python", "packages"}
    machine, _, date = provenance(result)
    assert machine.endswith(" s in total") and date == f"- date: {result['environment']['date']}"


@pytest.mark.integration
def test_reports_hold_every_score_and_nothing_from_elsewhere(planned, tmp_path, fake_scores):
    out = tmp_path / "out"
    run(planned("dtd", write_classes(tmp_path / "classes")), SETTINGS, out)
    run(planned("digits", None, "gmail", "clipcap", limit=12), SETTINGS, out)
    results = results_in(out)
    assert [result["benchmark"] for result in results] == ["digits", "dtd"]
    markdown, html = to_markdown(results), to_html(results, out)
    scores = [score for result in results for task in result["tasks"].values() for score in task["scores"].values()]
    assert len(markdown.splitlines()) == 2 + len(scores)
    top1 = results[1]["tasks"]["zero_shot"]["scores"]["top1"]
    low, high = results[1]["tasks"]["zero_shot"]["intervals"]["top1"]
    assert (
        f"| DTD | Zero-shot classification | top-1 | {top1:.3f} | {low:.3f} to {high:.3f} | "
        "6 images, 3 classes, 2 prompts per class |" in markdown
    )
    for score in scores:
        assert score is None or f"<b>{score:.3f}</b>" in html or f"<b>{score:.1f}</b>" in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    # Self-contained: whatever is shown lies in the file.
    assert not re.findall(r"""(?:src|href)=["'](?!data:image/(?:png|webp);base64,|#)""", html)
    assert "http" not in html.replace("http-equiv", "") and "url(" not in html and "<script" not in html
    assert html.count("data:image/webp") == 12 + 2 * 12 and html.count("data:image/png") == 1
    assert "Only 12 rows." in html
    prediction = json.loads((out / "digits" / "captioning.jsonl").read_text().splitlines()[0])
    assert prediction["caption"] in html


def test_captions_are_text_not_markup(planned, tmp_path, fake_scores, monkeypatch):
    monkeypatch.setattr(captioning, "write", lambda *args, **kwargs: ["<script>alert(1)</script>"])
    captions = write_captions(tmp_path / "captions", [["a <b>bold</b> cat"]])
    run(planned("coco", captions, "clipcap"), SETTINGS, tmp_path / "out")
    html = to_html(results_in(tmp_path / "out"), tmp_path / "out")
    assert "&lt;script&gt;alert(1)" in html and "<script" not in html and "a &lt;b&gt;bold" in html


def test_scores_as_a_table():
    measured = {
        "scores": {"a_R@1": 0.5, "a_R@5": 0.75, "a_median_rank": 2.0, "b_R@1": None},
        "intervals": {"a_R@1": [0.25, 1.2]},
        "missing": {"b_R@1": "why not"},
    }
    columns, rows = tabulate("retrieval", measured)
    assert columns == ["R@1", "R@5", "median rank"] and [row["label"] for row in rows] == ["a", "b"]
    first, second = (row["cells"] for row in rows)
    assert first[0] == {"value": "0.500", "low": "0.250", "high": "1.200", "bar": [25.0, 50.0, 100]}
    assert first[1:] == [{"value": "0.750"}, {"value": "2.0"}]
    assert second == [{"value": "missing", "why": "why not"}, None, None]
