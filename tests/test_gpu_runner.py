"""The runner of benchmarks/gpu: what it keeps of its parts, and the arithmetic of a line."""

import json
import re
import sys
import time

import bundle
import parts
import pytest
import runner
import torch
from measuring import Settings
from packaging.requirements import Requirement


@pytest.fixture
def part():
    lines = []
    return parts.Part(Settings("cpu", "bfloat16", quick=True), {"FLOP": 100.0, "B": 10.0}, lines.append), lines


def test_the_floor_is_the_larger_of_operations_and_bytes(part):
    part, lines = part
    with part.line("a call") as line:
        part.add(line, [4.0, 2.0, 5.0], count=8, unit="pairs", operations=100.0, moved=20.0)
    assert lines == [line]
    assert (line["seconds"], line["spread"], line["speed"]) == (4.0, [2.0, 5.0], 2.0)
    assert (line["floor_operations"], line["floor_bytes"], line["share"]) == (1.0, 2.0, 0.5)


def test_operations_and_bytes_are_counted():
    a, b = torch.randn(2, 3), torch.randn(3, 5, requires_grad=True)
    assert parts.count_operations(lambda: a @ b) == 2 * 2 * 3 * 5
    assert parts.moved_by_training([a, b]) == 4 * (2 * 6 + 9 * 15)


def test_a_line_that_fails_costs_no_other(part):
    part, lines = part
    with part.line("broken"):
        raise RuntimeError("no such kernel")
    with part.line("whole") as line:
        line["seconds"] = 1.0
    assert lines == [
        {"name": "broken", "failed": "RuntimeError: no such kernel"},
        {"name": "whole", "seconds": 1.0},
    ]


@pytest.mark.integration
def test_a_step_of_stage_1_is_measured(part):
    part, lines = part
    parts.PARTS["caching"](part)
    plain, cached = lines
    assert plain["speed"] > 0 and plain["share"] == pytest.approx(plain["floor_operations"] / plain["seconds"])
    assert cached["operations"] == 4 * plain["operations"]
    assert "of the speed of: plain batch of 4" in cached["note"]


SCRIPT = """
import json, sys, time
print("noise")
print(json.dumps({"name": sys.argv[1], "seconds": 1.0, "rates": {"FLOP": 5.0}, "note": sys.argv[2]}), flush=True)
if sys.argv[1] == "tests":
    sys.exit(3)
if sys.argv[1] == "vlm":
    time.sleep(60)
"""


def test_lines_outlive_parts_that_fail_or_run_out_of_time(tmp_path, monkeypatch):
    (tmp_path / "parts.py").write_text(SCRIPT)
    monkeypatch.setattr(runner, "SCRIPT", tmp_path / "parts.py")
    monkeypatch.setattr(runner, "SECONDS", {"rates": 1, "tests": 1, "vlm": 1, "caching": 20})
    start = time.monotonic()
    summary = runner.main(["--tiny", "--output", str(tmp_path / "out")])
    assert time.monotonic() - start < 20
    found = summary["parts"]
    assert [found[name]["status"] for name in ("rates", "vlm", "caching")] == ["finished", "out of time", "finished"]
    assert found["tests"]["status"] == "failed with exit code 3, see log.txt"
    assert [len(part["lines"]) for part in found.values()] == [1, 1, 1, 1]
    assert found["caching"]["lines"][0]["note"] == '{"FLOP": 5.0}'  # each part knows the rates
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert "| vlm | – | 1 s |" in (tmp_path / "out" / "summary.md").read_text()
    assert (tmp_path / "out" / "log.txt").read_text().count("noise") == 4


@pytest.mark.integration
def test_a_rehearsal_measures_the_rates(tmp_path):
    (name,) = runner.main(["--tiny", "--only", "rates", "--output", str(tmp_path)])["parts"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert name == "rates" and summary["parts"]["rates"]["status"] == "finished"
    assert summary["rates"]["FLOP"] > 1e6 and summary["rates"]["B"] > 1e6
    assert summary["environment"]["python"] == sys.version.split()[0]


def test_a_bundle_that_is_too_large_lists_its_files(tmp_path):
    for name, size in {"small": 1, "large": 3}.items():
        (tmp_path / name).write_bytes(b"x" * (size << 20))
    tree, wheels = [tmp_path / "large"], [tmp_path / "small"]
    assert bundle.check_size(tree, wheels).startswith("4.0 of 64 MiB: tree 3.0")
    with pytest.raises(SystemExit, match=r"(?s)largest files.*3\.00 .*large.*1\.00 .*small"):
        bundle.check_size(tree, wheels, limit_mib=3)


def test_the_bundle_is_what_the_package_asks_for():
    project = (bundle.REPOSITORY / "pyproject.toml").read_text()
    asked = [Requirement(text) for text in re.findall(r'^    "(\S+[<>=].*)",$', project, flags=re.MULTILINE)]
    pins = (bundle.FOLDER / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in pins if not line.startswith("#"))
    bounds = {requirement.name: requirement.specifier for requirement in asked}
    assert {"transformers", "diffusers", "datasets", "evaluate"} <= pins.keys() & bounds.keys()
    assert not [name for name in pins.keys() & bounds.keys() if pins[name] not in bounds[name]]
