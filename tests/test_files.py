"""Files and folders are whole or absent, whatever interrupts their writing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmail_hf import files
from gmail_hf.files import lock_folder, new_folder, replacing, try_lock, write_file

HOLDS = "import sys, time; from gmail_hf.files import *; {}; print(flush=True); time.sleep(600)"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "a.txt", []

    def recorded(name: str):
        original = getattr(os, name)
        return lambda *args: (events.append((name, path.read_text())), original(*args))

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, recorded(name))
    path.write_text("old")
    write_file(path, "né")
    assert events == [("fsync", "old"), ("replace", "old")]
    assert path.read_bytes() == "né".encode() and os.listdir(tmp_path) == ["a.txt"]


def test_no_other_module_writes_texts_or_bytes():
    def writes(call: ast.Call) -> bool:
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        modes = {getattr(argument, "value", None) for argument in call.args}
        return name in ("write_text", "write_bytes") or (name == "open" and bool(modes & {"w", "wb", "x", "xb"}))

    package, found = Path(files.__file__).parent, set()
    for path in package.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        found |= {path.name for call in calls if writes(call)}
    assert found == {"files.py"}


def test_lines_of_json(tmp_path):
    files.write_jsonl(tmp_path / "a.jsonl", [{"a": "né\n"}, {"b": None}])
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"a": "né\\n"}\n{"b": null}\n'


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    write_file(path, "old")
    with pytest.raises(error if isinstance(error, type) else OSError) as raised, replacing(path) as partial:
        assert partial.name.startswith(".a.txt.") and partial.suffix == ".part"
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    if raised.type is OSError:
        assert f"'{path}' could not be written (No space left on device)" in str(raised.value)


def test_what_a_killed_process_left_is_deleted(tmp_path):
    for name in (".a.txt.0123.part", ".b.txt.0123.part"):
        (tmp_path / name).touch()
    write_file(tmp_path / "a.txt", b"new")
    assert sorted(os.listdir(tmp_path)) == [".b.txt.0123.part", "a.txt"]


def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")

    def planted(_: int) -> str:
        (tmp_path / ".a.txt.known.part").symlink_to(tmp_path / "mine")
        return "known"

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(files.secrets, "token_hex", planted)  # in the moment between the choice of a name and its use
        write_file(tmp_path / "a.txt", "new")
    (tmp_path / ".a.txt.known.part").symlink_to(tmp_path / "mine")
    write_file(tmp_path / "a.txt", "new")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / ".made.part").symlink_to(tmp_path / "folder")
    with new_folder(tmp_path / "made") as folder:
        folder.mkdir()
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "folder" / "file").exists()
    assert not (tmp_path / "a.txt").is_symlink()


def test_others_may_read_what_safetensors_writes(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    with replacing(tmp_path / "a.safetensors") as partial:
        save_file({"a": np.zeros(2)}, partial)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_whole_or_absent(tmp_path):
    made = tmp_path / "parent" / "made"
    with pytest.raises(ValueError), new_folder(made) as folder:
        folder.mkdir()
        raise ValueError
    assert os.listdir(tmp_path / "parent") == []
    (tmp_path / "parent" / ".made.part" / "made").mkdir(parents=True)  # as a kill leaves it
    (tmp_path / "parent" / ".made.part" / "tmp123").touch()
    with new_folder(made) as folder:
        folder.mkdir()
        (folder / "file").touch()
        (folder.parent / "scratch").touch()
        assert not made.exists()
    assert os.listdir(tmp_path / "parent") == ["made"] and os.listdir(made) == ["file"]
    with pytest.raises(FileExistsError, match="made' already exists"), new_folder(made):
        pass
    assert os.listdir(made) == ["file"]


@pytest.fixture
def holding():
    """Starts a process that runs a statement and then waits."""
    started = []

    def hold(statement: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDS.format(statement)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        process.stdout.readline()
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_lock_ends_with_its_process(holding, tmp_path):
    process = holding(f"a = lock_folder({str(tmp_path)!r}); b = try_lock({str(tmp_path / 'b')!r})")
    with pytest.raises(FileExistsError, match="Another process is writing '.*Wait until it has finished"):
        lock_folder(tmp_path)
    assert try_lock(tmp_path / "b") is None
    process.kill()
    process.wait()
    first, second = lock_folder(tmp_path), lock_folder(tmp_path)  # the same process may hold it twice
    files.unlock_folder(first)
    assert (tmp_path / "_lock").exists()
    files.unlock_folder(second)
    assert not (tmp_path / "_lock").exists()
    assert try_lock(tmp_path / "b") is not None


def test_a_folder_has_one_maker(holding, tmp_path):
    process = holding(f"folder = new_folder({str(tmp_path / 'made')!r}); folder.__enter__()")
    with pytest.raises(FileExistsError, match="Another process is writing"), new_folder(tmp_path / "made"):
        pass
    process.kill()
    process.wait()
    with new_folder(tmp_path / "made") as folder:
        folder.mkdir()
    assert os.listdir(tmp_path) == ["made"]
