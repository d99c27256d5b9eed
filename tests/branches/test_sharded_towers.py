"""DDP and FSDP2 on two processes give the gradients of one, for every tower."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_towers import step
from towers import EVERY, TOWERS, attached

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).with_name("sharded_towers.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes found."""
    output = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [*command, str(SCRIPT), str(output)], capture_output=True, text=True, env=environment, timeout=240
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [load_file(output / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("method", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", TOWERS)
def test_two_processes_give_the_gradients_of_one(ranks, name, method):
    expected = step(attached(name).train(), name, EVERY)
    prefix = f"{method}/{name}/"
    found = [
        {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)} for tensors in ranks
    ]
    assert found[0].keys() == found[1].keys() == expected.keys() and len(expected) > 8
    torch.testing.assert_close(found[0].pop("loss") + found[1].pop("loss"), expected.pop("loss"), rtol=1e-4, atol=1e-5)
    for gradients in found:  # the mean over the processes
        torch.testing.assert_close(
            gradients, {key: grad / 2 for key, grad in expected.items()}, rtol=1e-4, atol=1e-5, msg=name
        )
