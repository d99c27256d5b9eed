"""`gmail-hf evaluate` as a user runs it, at a size of seconds."""

import json
import logging
from pathlib import Path

import pytest
from benchmark_data import save_clipcap, save_gmail, write_captions, write_classes
from huggingface_hub import ModelCard

from gmail_hf.commands import evaluate
from gmail_hf.commands.bundled import BENCHMARKS
from gmail_hf.evaluation import captioning, runner


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    gmail = save_gmail(root / "gmail")
    return {
        "gmail": gmail,
        "other": save_gmail(root / "other"),
        "clipcap": save_clipcap(root / "clipcap", gmail),
        "dtd": str(write_classes(root / "dtd")),
        "coco": str(write_captions(root / "coco", [["a red one", "a one"], ["a blue two", "a two"]])),
    }


@pytest.fixture
def run_evaluate(folders, tmp_path, monkeypatch):
    scores = dict.fromkeys(captioning.METRICS, 0.5) | {"METEOR": None}
    monkeypatch.setattr(captioning, "caption_metrics", lambda *args: scores)  # Java takes seconds
    monkeypatch.setattr(captioning, "missing_metrics", lambda *args: {"METEOR": "Java is missing; install it"})

    def main(benchmarks, *options):
        model = ["--model", folders["gmail"], "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
        return evaluate.main([*model, "--benchmarks", benchmarks, *map(str, options)])

    return main


@pytest.fixture(autouse=True)
def log_as_the_command_does(caplog):
    caplog.set_level(logging.INFO, logger="gmail_hf")


def test_benchmarks_one_after_the_other_and_once(run_evaluate, folders, tmp_path, monkeypatch, caplog):
    options = ["--dataset", f"dtd={folders['dtd']}", f"coco={folders['coco']}", "--captioner", folders["clipcap"]]
    options += ["--batch_size", "2", "--num_beams", "2", "--modality", "real"]
    results = run_evaluate("dtd,coco", *options)
    assert [list(result["tasks"]) for result in results.values()] == [["zero_shot"], ["retrieval", "captioning"]]
    assert "METEOR will be missing: Java is missing; install it." in caplog.text
    out = tmp_path / "out"
    for name, result in results.items():
        assert json.loads((out / f"{name}.json").read_text()) == result
    report = (out / "report.md").read_text()
    assert report.count("| DTD |") == 2 and report.count("| COCO |") == 17
    assert all(line in caplog.text for line in report.splitlines())
    assert "<title>Evaluation of " in (out / "report.html").read_text()

    # The same command goes on with what is not finished.
    (out / "coco.json").unlink()
    monkeypatch.setitem(runner.EVALUATORS, "zero_shot", None)
    again = run_evaluate("dtd,coco", *options)
    assert [result["tasks"] for result in again.values()] == [result["tasks"] for result in results.values()]
    with pytest.raises(FileExistsError, match="settings.num_beams: 2 -> 1"):
        run_evaluate("dtd,coco", *options, "--num_beams", "1")


@pytest.mark.integration
def test_digits_needs_no_data(run_evaluate, tmp_path):
    results = run_evaluate("digits", "--limit", "12")
    assert list(results["digits"]["tasks"]) == ["retrieval", "zero_shot", "alignment"]
    counts = [next(iter(task["counts"].items())) for task in results["digits"]["tasks"].values()]
    assert counts == [("images", 12), ("images", 12), ("pairs", 12)]


@pytest.mark.parametrize(
    ("benchmarks", "options", "error", "message"),
    [
        ("mnist", [], ValueError, "Unknown benchmark 'mnist'; choose from coco, flickr30k, .*digits"),
        ("dtd,", ["--dataset", "dtd={dtd}"], ValueError, "Unknown benchmark ''"),
        ("dtd", [], ConnectionError, "clip-benchmark/wds_vtab-dtd' cannot be reached"),
        ("dtd", ["--dataset", "cars={dtd}"], ValueError, r"NAME from \['dtd'\], got 'cars="),
        ("dtd", ["--dataset", "dtd={coco}"], ValueError, r"lacks the column\(s\) \['cls'\]"),
        ("coco", ["--dataset", "coco={coco}", "--modality", "fake"], ValueError, "has no branch 'fake'"),
        ("dtd", ["--dataset", "dtd={dtd}", "--clip_score_model", "{gmail}"], ValueError, "needs captions"),
        ("dtd", ["--dataset", "dtd={dtd}", "--clip_score_model", "{clipcap}"], ValueError, "must be a CLIP"),
        ("scienceqa", ["--dataset", "scienceqa={dtd}"], ValueError, "lacks the column"),
        ("dtd", ["--dataset", "dtd={dtd}", "--captioner", "{gmail}"], ValueError, "--captioner must be an image"),
        ("dtd", ["--dataset", "dtd={dtd}", "--model", "gmail-nowhere"], FileNotFoundError, "No model at"),
        ("dtd", ["--dataset", "dtd={dtd}", "--dtype", "int8"], ValueError, "--dtype: invalid choice: 'int8'"),
        ("dtd", ["--dataset", "dtd={dtd}", "--limit", "0"], ValueError, "--limit must be at least 1"),
        ("dtd", ["--dataset", "dtd={dtd}", "--card", "{dtd}"], FileNotFoundError, "No card found at"),
        ("dtd", ["--dataset", "dtd={dtd}", "--card", "{other}"], ValueError, "--card belongs to the model"),
        ("digits", ["--limit", "5"], ValueError, "--limit of 10 or more"),
        ("digits", ["--output_dir", "{gmail}/scores"], ValueError, "inside '.*gmail', .* Choose a folder outside"),
        ("dtd", ["--dataset", "dtd={dtd}", "--output_dir", "{dtd}"], ValueError, "inside '.*dtd', which .* reads"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_any_work(run_evaluate, folders, tmp_path, benchmarks, options, error, message):
    with pytest.raises(error, match=message):
        run_evaluate(benchmarks, *(option.format(**folders) for option in options))
    assert not (tmp_path / "out").exists()


def test_scores_go_into_a_card_and_leave_the_model_the_same(run_evaluate, folders, tmp_path, caplog):
    readme = Path(folders["gmail"], "README.md")
    assert "Not run yet." in readme.read_text()
    options = ["--dataset", f"dtd={folders['dtd']}", "--card", folders["gmail"]]
    result = run_evaluate("dtd", *options)["dtd"]
    entries = ModelCard.load(readme).data.eval_results
    assert {entry.metric_type: entry.metric_value for entry in entries}["accuracy"] == pytest.approx(
        result["tasks"]["zero_shot"]["scores"]["top1"], abs=1e-4
    )
    assert "| DTD |" in readme.read_text() and "Not run yet." not in readme.read_text()
    content = readme.read_text()
    run_evaluate("dtd", *options)
    assert "DTD: zero_shot (finished)" in caplog.text and readme.read_text() == content
    run_evaluate("dtd", *options, "--modality", "gen", "--output_dir", tmp_path / "gen")
    entries = ModelCard.load(readme).data.eval_results
    conditions = [entry.metric_args for entry in entries if entry.metric_type == "accuracy"]
    assert conditions == [None, {"modality": "gen"}]


def test_a_captioner_gets_its_own_scores_next_to_those_of_a_clip(run_evaluate, folders):
    run_evaluate("dtd", "--dataset", f"dtd={folders['dtd']}")
    card = Path(folders["clipcap"], "README.md")
    card.write_text("---\nlicense: mit\n---\n# Captioner\n")
    options = ["--model", folders["clipcap"], "--card", folders["clipcap"]]
    run_evaluate("coco", "--dataset", f"coco={folders['coco']}", *options)
    assert "| COCO | Captions |" in card.read_text() and "DTD" not in card.read_text()


def test_help_lists_the_benchmarks(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"The benchmarks are {', '.join(BENCHMARKS)}." in told
