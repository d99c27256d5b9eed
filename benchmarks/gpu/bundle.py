"""
Download the packages that a GPU machine without network needs into wheels/; `make gpu-bundle` runs this.

The wheels are for Linux x86-64 and Python 3.12. Together with the working tree they must not exceed 64 MiB. If they
do, the largest files are listed. The commit is saved with them, because the copied tree has no history.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
WHEELS = FOLDER / "wheels"
REPOSITORY = FOLDER.parents[1]
LIMIT_MIB = 64
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    shutil.rmtree(WHEELS, ignore_errors=True)
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    target = ["--no-deps", "--only-binary=:all:", "--implementation=cp", "--python-version=3.12", *platforms]
    files = [f"--dest={WHEELS}", f"--requirement={FOLDER / 'requirements.txt'}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *target, *files], check=True)
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    (WHEELS / "COMMIT").write_text(f"{commit.strip()}{' with uncommitted changes' if changes else ''}\n")
    tree = [REPOSITORY / name for name in _git("ls-files", "-z", "-co", "--exclude-standard").split("\0") if name]
    print(check_size([path for path in tree if path.is_file()], list(WHEELS.iterdir())))


def check_size(tree: list[Path], wheels: list[Path], limit_mib: float = LIMIT_MIB) -> str:
    """
    Describe the sizes in words.

    Raises:
        SystemExit: the total is larger than `limit_mib`; the message lists the largest files.
    """
    sizes = {path: path.stat().st_size / 2**20 for path in [*tree, *wheels]}
    total = sum(sizes.values())
    text = f"{total:.1f} of {limit_mib} MiB: tree {sum(sizes[path] for path in tree):.1f}"
    text += "".join(f"\n  {sizes[path]:6.2f}  {path.name}" for path in sorted(wheels))
    if total > limit_mib:
        largest = sorted(sizes, key=sizes.get, reverse=True)[:20]
        listed = "\n".join(f"  {sizes[path]:6.2f}  {os.path.relpath(path, REPOSITORY)}" for path in largest)
        raise SystemExit(f"The bundle is too large: {text}\nThe largest files (MiB):\n{listed}")
    return text


def _git(*command: str) -> str:
    return subprocess.run(["git", "-C", REPOSITORY, *command], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
