"""Where a result comes from: machine, software, commit, date."""

import subprocess
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """What [`gmail_hf.benchmarks.environment`] tells, and the commit."""
    from gmail_hf.benchmarks import environment as installed

    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../src", "."], capture_output=True, text=True
    ).stdout
    return {**installed(), "git_commit": commit or None, "uncommitted_changes": bool(changed)}


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
