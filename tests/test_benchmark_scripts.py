"""The benchmarks' own arithmetic, and one of them from end to end on a tiny model."""

import json

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
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert alone("jobs:double", Settings(threads=3), number=4) == [3, 8]
    with pytest.raises(MissingPeer, match="install it"):
        alone("jobs:peer", Settings())
    with pytest.raises(RuntimeError, match="no disk"):
        alone("jobs:broken", Settings())


@pytest.mark.skipif(not measuring.CLEAR_REFS.exists(), reason="the peak restarts on Linux only")
def test_the_peak_is_that_of_the_call():
    settings = Settings()
    measuring.forget_peak(settings)
    before = measuring.peak_mb(settings)
    held = b"x" * (64 << 20)
    assert measuring.peak_mb(settings) - before >= 60
    del held
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
    assert "| infer | a mixed batch | transformers CLIPModel |" in capsys.readouterr().out


def test_a_missing_peer_has_a_line_in_the_table():
    line = missing("step", "ours", "theirs", "`pip install theirs`")
    assert "missing: `pip install theirs` |" in run.table([line])
    assert run.describe(line).endswith("missing, `pip install theirs`")
