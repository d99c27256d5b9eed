"""The benchmarks' own arithmetic, and one of them from end to end on a tiny model."""

import json
import mmap
import sys

import caching
import inference
import load
import measuring
import pytest
import run
import subjects
from measuring import MissingPeer, Settings, alone, growth, missing, row, take_turns


def test_sides_take_turns_forth_and_back():
    order = []
    sides = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert take_turns(sides, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert "".join(order) == "abbaab"


@pytest.mark.parametrize(("aim", "met"), [(">= 1.5", True), (">= 1.6", False), ("<= 1.5", True), (None, None)])
def test_the_ratio_is_the_median_of_the_rounds_and_meets_its_aim_or_not(aim, met):
    line = row("step", "ours", "theirs", "s", [3.0, 8.0, 1.0], [2.0, 1.0, 1.0], aim)
    assert (line["ours"], line["theirs"]) == (3.0, 1.0)
    assert (line["ratio"], line["spread"]) == (1.5, [1.0, 8.0])
    assert line.get("met") is met


def test_growth_is_against_the_line():
    line = growth("scale", "time by batch", {64: 2.0, 128: 3.0, 256: 12.0}, "s")
    assert (line["ratio"], line["met"]) == (6 / 4, False)
    assert line["points"] == {"64": 2.0, "128": 3.0, "256": 12.0}


def test_a_job_of_its_own_returns_fails_or_lacks_its_peer(tmp_path, monkeypatch):
    (tmp_path / "jobs.py").write_text(
        "from measuring import MissingPeer\n"
        "def double(settings, number):\n    print('noise')\n    return [settings.threads, 2 * number]\n"
        "def peer(settings):\n    raise MissingPeer('not here: install it')\n"
        "def broken(settings):\n    raise OSError('no disk')\n"
        "def allocator(settings):\n    import os\n    return os.environ['MALLOC_MMAP_THRESHOLD_']\n"
        "def greedy(settings):\n    import os\n    os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert alone("jobs:double", Settings(threads=3), number=4) == [3, 8]
    with pytest.raises(MissingPeer, match="install it"):
        alone("jobs:peer", Settings())
    with pytest.raises(RuntimeError, match="no disk"):
        alone("jobs:broken", Settings())
    assert alone("jobs:allocator", Settings(), environment=caching.MALLOC) == "100000"
    if sys.platform != "win32":
        with pytest.raises(MissingPeer, match="runs out of memory"):
            alone("jobs:greedy", Settings())


@pytest.mark.skipif(not measuring.CLEAR_REFS.exists(), reason="the peak restarts on Linux only")
def test_the_peak_is_that_of_the_call():
    settings = Settings()
    measuring.forget_peak(settings)
    before = measuring.peak_mb(settings)
    with mmap.mmap(-1, 64 << 20) as held:  # by malloc, MALLOC_TRIM_THRESHOLD_ of the shell could keep it
        for _ in range(64):
            held.write(bytes(1 << 20))
        assert measuring.peak_mb(settings) - before >= 60
    measuring.forget_peak(settings)
    assert measuring.peak_mb(settings) - before < 60


def test_a_run_prints_a_table_and_writes_results_and_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(subjects.SIZES, "tiny", ((16, 1, 1, 56), (16, 1, 1), 8))
    result = run.main(
        ["--quick", "--only", "infer", "--size", "tiny", "--device", "cpu", "--output_dir", str(tmp_path)]
    )
    assert [line["measured"] for line in result["rows"]] == [
        "real branch",
        "gen branch, merged",
        "gen branch, unmerged",
        "a mixed batch",
    ]
    assert all(line["ratio"] > 0 and len(line["rounds"]["ours"]) == 3 for line in result["rows"])
    (path,) = tmp_path.glob("*-cpu.json")
    assert json.loads(path.read_text()) == result
    assert path.with_suffix(".svg").stat().st_size > 1000
    assert "| infer | a mixed batch (tiny, batch 2) | transformers CLIPModel |" in capsys.readouterr().out


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch):
    def broken(settings):
        yield row("load", "ours", "theirs", "s", [1.0], [2.0])
        raise RuntimeError("no disk")

    monkeypatch.setattr(load, "load", broken)
    monkeypatch.setattr(inference, "infer", lambda settings: [row("infer", "ours", "theirs", "s", [1.0], [1.0])])
    with pytest.raises(SystemExit, match="Not finished: load"):
        run.main(["--only", "load", "infer", "--device", "cpu", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("*-cpu.json")
    result = json.loads(path.read_text())
    assert [line["benchmark"] for line in result["rows"]] == ["load", "infer"]
    assert result["failed"] == {"load": "no disk"}


def test_cached_lines_stand_beside_what_can_be_run(monkeypatch):
    calls = []

    def alone(job, settings, environment, **arguments):
        assert environment == caching.MALLOC
        calls.append(arguments)
        return 10.0 if job == "measuring:imports" else {"seconds": float(arguments["batch"]), "mb": 110.0}

    monkeypatch.setattr(caching, "alone", alone)
    lines = list(caching.compared(Settings(quick=True), "tiny", 64, 4, whole=False))
    assert [line["against"] for line in lines] == ["plain batch 4", "16 plain batches of 4"]
    assert lines[0]["ratio"] == 1 and lines[1]["ratio"] == 64 / (16 * 4)
    assert {call["batch"] for call in calls if call} == {64, 4}


def test_a_missing_peer_has_a_line_in_the_table():
    line = missing("step", "ours", "theirs", "`pip install theirs`")
    assert "missing: `pip install theirs` |" in run.table([line])
    assert run.describe(line).endswith("missing, `pip install theirs`")
