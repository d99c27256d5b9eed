"""Two processes give the gradient of one; started by torchrun and by accelerate, on 127.0.0.1."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_cases import CASES, cache, one_step, train
from safetensors.torch import load_file

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).with_name("distributed_cases.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher(name: str) -> list[str]:
    address = ["127.0.0.1", str(free_port())]
    if name == "torchrun":
        return [
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-addr",
            address[0],
            "--master-port",
            address[1],
        ]
    # `--cpu --num_processes 2` starts a single process and says nothing; this with ACCELERATE_USE_CPU starts two.
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return ["accelerate.commands.launch", *options, "--main_process_ip", address[0], "--main_process_port", address[1]]


@pytest.fixture(scope="module", params=["torchrun", "accelerate"])
def results(request, tmp_path_factory, clip_folder):
    """What each of the two processes found."""
    output = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", *launcher(request.param), str(SCRIPT), str(output), str(clip_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [
        (load_file(path), json.loads(path.with_suffix(".json").read_text())) for path in sorted(output.glob("*.s*"))
    ]
    assert [summary["world_size"] for _, summary in ranks] == [2, 2]
    return ranks


def part(tensors: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("split", ["even", "uneven", "none"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "local"])
def test_two_processes_give_the_gradient_of_one(results, clip_folder, case, split):
    expected = one_step(str(clip_folder), case, slice(None))
    for tensors, _ in results:
        torch.testing.assert_close(part(tensors, f"{case}/{split}/"), expected, rtol=1e-4, atol=1e-6)


def test_local_negatives_give_another_gradient(results, clip_folder):
    expected = one_step(str(clip_folder), "local", slice(None))
    name = "visual_projection.branches.gen"
    (first, _), (second, _) = results
    actual = first[f"local/even/{name}"]
    assert torch.equal(actual, second[f"local/even/{name}"])  # DDP's mean of both
    assert (actual - expected[name]).norm() > 0.05 * expected[name].norm()


def test_two_processes_cache_what_one_does(results, clip_folder, tmp_path):
    expected = cache(str(clip_folder), tmp_path, 0, 1)
    for tensors, _ in results:
        assert torch.equal(tensors["cache"], expected)


def test_training_ends_where_one_process_ends(results, clip_folder, tmp_path):
    weights, log = train(str(clip_folder), tmp_path, batch_size=8)
    (first, summary), (second, _) = results
    torch.testing.assert_close(part(first, "trained/"), weights, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("trained/"))
    for ours, expected in zip(summary["log"], log, strict=True):
        same = [key for key in expected if key.endswith(("loss", "cosine", "distance")) or "R@" in key]
        assert same or "train_runtime" in expected
        for key in same:
            assert ours[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


def test_skipped_pairs_leave_processes_in_step(results):
    for _, summary in results:
        *log, metrics = summary["skipping"]
        assert [entry["skipped_pairs"] for entry in log if "skipped_pairs" in entry][-1] == 3
        assert metrics["eval_loss"] > 0 and 0 <= metrics["eval_gen_to_real_R@1"] <= 1
