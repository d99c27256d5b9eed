"""The dispatcher: what `gmail-hf` prints, imports and returns."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gmail_hf.commands import cli, demo, embed, train

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_help_fits_on_a_screen(capsys):
    for argv in ([], ["--help"], ["-h"]):
        cli.main(argv)
        text = capsys.readouterr().out
        assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 88
        assert all(f"\n  {name} " in text for name in cli.COMMANDS)


def test_version(capsys):
    from gmail_hf import __version__

    cli.main(["--version"])
    assert capsys.readouterr().out == f"gmail-hf {__version__}\n"


def failed(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tran"], "unknown command 'tran'; did you mean train?"),
        (["xyz"], "unknown command 'xyz'; see gmail-hf --help"),
        (["demo", "--num_heldout", "11", "--num_test", "10"], "--num_heldout must not be larger than --num_test"),
        (["demo", "--max_step", "3"], "unknown option --max_step; did you mean --max_steps?"),
        (["demo", "--max_steps", "three"], "argument --max_steps/--max-steps: invalid int value: 'three'"),
        (["demo", "--config", "nowhere.yaml"], "--config 'nowhere.yaml' does not exist"),
        (["evaluate", "--model", "m"], "the following arguments are required: --benchmarks"),
        (["push", "folder-of-nobody", "org/pairs"], "'folder-of-nobody' has no manifest.json"),
        (["train", "--dataset", "nowhere/at/all", "--model", "digits"], "nowhere/at/all"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    error = failed(capsys, *argv)
    last = error.splitlines()[-1]
    assert last.startswith("gmail-hf: error: ") and message in last and "Traceback" not in error


def test_debug_shows_the_traceback(monkeypatch):
    def main(argv):
        calls.append(argv)
        raise ValueError("two\nlines")

    calls = []
    monkeypatch.setattr(demo, "main", main)
    with pytest.raises(ValueError, match="two"):
        cli.main(["demo", "--seed", "1", "--debug"])
    with pytest.raises(SystemExit):
        cli.main(["demo", "--debug", "underflow_overflow"])  # transformers' own
    assert calls == [["--seed", "1"], ["--debug", "underflow_overflow"]]


def test_a_message_of_several_lines_becomes_one(monkeypatch, capsys):
    def main(argv):
        raise ValueError("two\n  lines")

    monkeypatch.setattr(demo, "main", main)
    assert failed(capsys, "demo") == "gmail-hf: error: two lines\n"


def test_a_file_name_that_is_not_utf8_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "main", lambda argv: os.fsdecode(b"photos/caf\xe9.png").encode())
    expected = r"gmail-hf: error: 'photos/caf\udce9.png' is not valid UTF-8: rename the file."
    assert failed(capsys, "demo") == expected + "\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(argv):
        raise TypeError("a bug")

    monkeypatch.setattr(demo, "main", main)
    with pytest.raises(TypeError):
        cli.main(["demo"])


@pytest.mark.parametrize(
    ("command", "interrupt", "message"),
    [
        (embed, KeyboardInterrupt(), "Run the same command to continue."),
        (demo, KeyboardInterrupt(), "Run the same command to start again."),
        (train, KeyboardInterrupt("Do this."), "Do this."),
    ],
)
def test_interrupt_says_how_to_continue(monkeypatch, capsys, command, interrupt, message):
    def main(argv):
        raise interrupt

    monkeypatch.setattr(command, "main", main)
    with pytest.raises(SystemExit) as exit:
        cli.main([command.__name__.rpartition(".")[2]])
    assert exit.value.code == 130
    assert capsys.readouterr().err == f"\ngmail-hf: interrupted. {message}\n"


def test_an_interrupted_training_names_its_checkpoint(monkeypatch, tmp_path):
    from gmail_hf.commands.common import fit
    from gmail_hf.training.resuming import seal

    class Trainer:
        def __init__(self):
            self.args = type("Arguments", (), {"output_dir": str(tmp_path / "run")})

        def train(self, resume_from_checkpoint):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="No checkpoint was saved yet"):
        fit(Trainer(), None)
    for step in (2, 10):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        seal(tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(KeyboardInterrupt, match=r"--resume_from_checkpoint true to continue from .*checkpoint-10\."):
        fit(Trainer(), None)


def test_each_command_is_a_module_with_help(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as exit:
            cli.main([name, "--help"])
        assert exit.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: gmail-hf {name} ") and f"    gmail-hf {name}" in text


def test_own_options_come_before_those_of_transformers(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    groups = ["\nmodel:\n", "\ndata:\n", "\ngmail_hf.GmailTrainingArguments:\n", "\ntransformers.TrainingArguments:\n"]
    assert sorted(groups, key=text.index) == groups
    transformers = text.index(groups[-1])
    for option in ("--stage", "--dataset ", "--consistency_weight", "--pairing"):
        assert text.index(f"  {option}") < transformers
    for option in ("--learning_rate", "--max_steps", "--push_to_hub", "--hub_model_id"):
        assert text.index(f"  {option} ") > transformers
    assert "--learning-rate" not in text


@pytest.mark.parametrize("command", ["train", "caption", "diagnose", "curate"])
def test_an_output_dir_that_is_a_file_is_refused_before_any_work(command, tmp_path, capsys):
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit):
        cli.main([command, "--model", "nowhere", "--dataset", "nowhere", "--output_dir", str(tmp_path / "out")])
    assert "out' is not a folder that can be written to (File exists). Choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("diagnose", "--device", "--device 'nowhere' cannot be used"),
        ("curate", "--device", "--device 'nowhere' cannot be used"),
        ("embed", "--device", "--device 'nowhere' cannot be used"),
        ("diagnose", "--model", "No model at 'nowhere'"),
        ("curate", "--model", "No model at 'nowhere'"),
    ],
)
def test_mistakes_are_named_before_data_is_loaded(command, option, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = ("--output_file", "out.parquet") if command == "embed" else ()
    options = {"--model": "digits", "--dataset": "absent", option: "nowhere"}
    argv = [word for pair in options.items() for word in pair]
    with pytest.raises(SystemExit):
        cli.main([command, *argv, *output])
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_named_before_data_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit):
        cli.main(["diagnose", "--model", "digits", "--dataset", "absent"])
    assert 'sklearn is missing; install it with `pip install "gmail-hf[evaluation]"`' in capsys.readouterr().err


def test_no_heavy_import_before_a_command_is_chosen():
    code = "import sys; from gmail_hf.commands.cli import main; main(['--help']); main(['--version'])\n"
    code += "print(sorted({'torch', 'transformers', 'datasets', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("demo", "demo"),
        ("evaluate_gmail", "evaluate"),
        ("generate_dataset", "generate"),
        ("push_dataset", "push"),
        ("train_clipcap", "caption"),
        ("train_gmail", "train"),
        ("train_llava", "vlm"),
    ],
)
def test_examples_run_their_command(script, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: gmail-hf {command} ")
