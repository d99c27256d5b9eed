"""The checkpoints of a run: which ones are complete, which one to resume from, and which ones to delete."""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..files import sync_folder, write_file

# The sizes of a checkpoint's files, written last.
SEAL = "files.json"
# May be edited by hand.
CARD = "README.md"

logger = logging.get_logger(__name__)


def checkpoint_folder(output_dir: str | os.PathLike, step: int) -> Path:
    return Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete after all of its files are on the disk."""
    sync_folder(checkpoint)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in (SEAL, CARD)]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_file(checkpoint / SEAL, json.dumps(sizes, indent=2) + "\n")


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint. The seal is deleted first, so an interrupted deletion leaves an incomplete checkpoint."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def damage(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint; None if it is complete."""
    try:
        sizes = json.loads(Path(checkpoint, SEAL).read_text(encoding="utf-8"))
        for name, size in sizes.items():
            found = Path(checkpoint, name).stat().st_size
            if found != size:
                return f"{name} has {found} instead of {size} bytes"
    except FileNotFoundError as error:
        missing = os.path.relpath(error.filename, checkpoint)
        return "it was not written completely" if missing == SEAL else f"{missing} is missing"
    except NotADirectoryError:
        return "it is not a folder"
    except (ValueError, AttributeError):
        return f"{SEAL} cannot be read"
    return None


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a folder in the order of their steps, complete or not."""
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((path for path in found if path.name.rpartition("-")[2].isdecimal()), key=_step)


def last_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint. A warning lists newer ones that are damaged."""
    for checkpoint in reversed(checkpoints(output_dir)):
        found = damage(checkpoint)
        if found is None:
            return checkpoint
        logger.warning(f"Skipping '{checkpoint}': {found}.")
    return None


def rotate(output_dir: str | os.PathLike, step: int, limit: int | None, best: str | None = None) -> None:
    """
    Delete checkpoints until `limit` are left: first damaged ones, then those of an earlier run with more than `step`
    steps, then the oldest. The checkpoints of `step` and `best` are kept.
    """
    if limit is None or limit <= 0:
        return
    kept = {checkpoint_folder(output_dir, step), *([Path(best)] if best else [])}
    found = checkpoints(output_dir)
    order = sorted(found, key=lambda path: (damage(path) is None, _step(path) <= step, _step(path)))
    for checkpoint in [path for path in order if path not in kept][: max(0, len(found) - max(limit, len(kept)))]:
        delete(checkpoint)


def check_output_dir(output_dir: str | os.PathLike, resume_from_checkpoint: str | bool | None = None) -> str | None:
    """
    Refuse to mix two runs in one folder, and find the checkpoint to resume from.

    Args:
        output_dir: the folder of the run.
        resume_from_checkpoint: a checkpoint folder; True or `"true"` for the last complete one in `output_dir`; None
            or False for a new run. A new run may use the folder of a run that was killed during its first save.

    Returns:
        The checkpoint to resume from, or None for a new run.

    Raises:
        FileExistsError: a new run, but `output_dir` holds another one.
        FileNotFoundError: there is no complete checkpoint to resume from.
    """
    folder, resume = Path(output_dir), str(resume_from_checkpoint or "")
    if resume.lower() not in ("", "false", "true"):
        found = damage(resume)
        if found is not None:
            raise FileNotFoundError(f"'{resume}' is not a complete checkpoint: {found}. Choose another one.")
        own = [path.resolve() for path in checkpoints(folder)]
        if Path(resume).resolve() in own[:-1]:
            newer = ", ".join(path.name for path in own[own.index(Path(resume).resolve()) + 1 :])
            logger.warning_once(
                f"Resuming from '{resume}', but '{folder}' also contains {newer}. Delete what you do not need: "
                "`--resume_from_checkpoint true` takes the complete checkpoint with the most steps."
            )
        return resume
    last = last_checkpoint(folder)
    if resume.lower() == "true":
        if last is None:
            raise FileNotFoundError(
                f"'{folder}' has no checkpoint to resume from. Run without --resume_from_checkpoint to start again."
            )
        return str(last)
    if last is not None:
        raise FileExistsError(
            f"'{folder}' contains another run. Resume it with --resume_from_checkpoint true, or choose another "
            "--output_dir."
        )
    if any((folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise FileExistsError(f"'{folder}' contains a trained model. Choose another --output_dir, or delete it.")
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
