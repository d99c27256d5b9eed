"""The machine and the software versions that a score was measured with."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = (
    *("gmail-hf", "torch", "transformers", "peft", "datasets", "diffusers"),
    *("scikit-learn", "scipy", "numpy", "pycocoevalcap"),
)


def environment(repository: str | os.PathLike | None = None) -> dict[str, Any]:
    """
    Return the date, machine, device, Python version and package versions.

    Args:
        repository: folder of a git checkout. Its commit is added, and whether it has uncommitted changes.
    """
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {device}",
        "python": platform.python_version(),
        "packages": packages,
    }
    if repository is not None:
        git = ["git", "-C", str(repository)]
        answers = [
            subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        found |= {"git_commit": answers[0] or None, "uncommitted_changes": bool(answers[1])}
    return found
