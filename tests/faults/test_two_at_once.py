"""A folder that another process writes is refused before anything is computed."""

import os
import subprocess
import sys

import pytest
from benchmark_data import write_classes

from gmail_hf.commands import cli

HOLDER = """
import sys, time
from gmail_hf.files import lock_folder, new_folder
held = new_folder(sys.argv[2]) if sys.argv[1] == "prepare" else lock_folder(sys.argv[2])
if sys.argv[1] == "prepare":
    held.__enter__()
print(flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_the_second_run_is_refused(command, pairs_file, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    argv = [command, "--dataset", pairs_file, "--model", "digits", "--output_dir", str(output)]
    argv += ["--max_steps=1", "--save_steps=1", "--report_to=none"] * (command == "train")
    other = subprocess.Popen([sys.executable, "-c", HOLDER, command, str(output)], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(SystemExit) as end, monkeypatch.context() as patch:
            patch.setattr(
                "gmail_hf.commands.train.load_two_branches", lambda *_, **__: pytest.fail("a model was loaded")
            )
            cli.main(argv)
        assert end.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "Another process is writing" in line and "Wait until it has finished, or choose another folder" in line
        assert os.listdir(output) == ["_lock"] if command == "train" else not output.exists()
    finally:
        other.kill()
        other.wait()
    cli.main(argv)
    assert "checkpoint-1" in os.listdir(output) if command == "train" else (output / "state.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_second_evaluation_is_refused(clip_folder, tmp_path, capsys):
    argv = ["evaluate", "--model", str(clip_folder), "--benchmarks", "dtd", "--output_dir", str(tmp_path / "out")]
    argv += ["--dataset", f"dtd={write_classes(tmp_path / 'classes')}"]
    other = subprocess.Popen([sys.executable, "-c", HOLDER, "evaluate", str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 2
        assert "Another process is writing" in capsys.readouterr().err.splitlines()[-1]
    finally:
        other.kill()
        other.wait()
    cli.main(argv)
    assert (tmp_path / "out" / "dtd.json").exists()
