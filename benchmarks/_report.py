"""Where a result comes from: machine, software, commit, date."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("gmail-hf", "torch", "transformers", "peft", "datasets", "diffusers", "scikit-learn", "numpy")


def environment() -> dict:
    import torch

    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../src", "."], capture_output=True, text=True
    ).stdout
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {device}",
        "python": platform.python_version(),
        "packages": packages,
        "git_commit": commit or None,
        "uncommitted_changes": bool(changed),
    }


def provenance(result: dict) -> list[str]:
    """Lines of a Markdown list: the machine, the software, the commit and the date of a result."""
    where = result["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items() if number)
    return [
        f"- machine: {where['machine']}; {result['seconds']} s in all",
        f"- software: Python {where['python']}, {packages}",
        f"- git commit: {where['git_commit']}" + (" with uncommitted changes" * where["uncommitted_changes"]),
        f"- date: {where['date']}",
    ]
