"""Loading pairs from any source, and the checks of a command before a long run."""

import os
import shutil
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .data import PAIR_COLUMNS


def load_pairs(
    name: str,
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    max_samples: int | None = None,
) -> Dataset:
    """
    A data set of pairs with the columns of [`data.PAIR_COLUMNS`].

    Args:
        name: a Hub id; a folder that `save_to_disk` wrote; a parquet file, a glob of them or a folder that holds some;
            or a folder of images with a metadata file (`datasets`' imagefolder, columns `real_image_file_name` and
            `generated_image_file_name`).
        split: the split; a source without splits is `train`.
        config_name, revision: of a data set on the Hub.
        columns: the data set's names for those of [`data.PAIR_COLUMNS`] that it calls otherwise.
        max_samples: keep this many pairs, the first ones.

    Raises:
        FileNotFoundError: `name` looks like a path that does not exist.
        ValueError: an unknown split, or a missing column.
    """
    dataset = _load(name, split, config_name, revision)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"'{name}' has no split '{split}'; it has {list(dataset)}.")
        dataset = dataset[split]
    dataset = rename_columns(dataset, columns or {}, name)
    return dataset if max_samples is None else dataset.select(range(min(max_samples, len(dataset))))


def rename_columns(dataset: Dataset, columns: dict[str, str], name: str) -> Dataset:
    """
    Rename columns of a data set.

    Args:
        dataset: any data set.
        columns: by new name, the present one; a column that already has the new name of another one is removed.
        name: of the data set, for the error.

    Raises:
        ValueError: a column to be renamed is missing.
    """
    renames = {theirs: ours for ours, theirs in columns.items() if theirs != ours}
    missing = [theirs for theirs in renames if theirs not in dataset.column_names]
    if missing:
        raise ValueError(f"'{name}' has no column(s) {missing}; it has {dataset.column_names}.")
    replaced = [ours for ours in renames.values() if ours in dataset.column_names and ours not in renames]
    return dataset.remove_columns(replaced).rename_columns(renames)


def _load(name: str, split: str, config_name: str | None, revision: str | None) -> Dataset | DatasetDict:
    path = Path(name)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            dataset = load_from_disk(name)
            return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
        # Splits follow from the names of files and folders, as in a repository on the Hub.
        return load_dataset("parquet" if any(path.rglob("*.parquet")) else "imagefolder", data_dir=name)
    if name.endswith(".parquet"):
        return load_dataset("parquet", data_files=name)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"No data set at '{name}'.")
    available = datasets.get_dataset_split_names(name, config_name, revision=revision)
    if split not in available:
        raise ValueError(f"'{name}' has no split '{split}'; it has {available}.")
    return load_dataset(name, config_name, split=split, revision=revision)


def check_output_dir(output_dir: str | os.PathLike, resume_from_checkpoint: str | bool | None = None) -> str | None:
    """
    Refuse to mix two runs in one folder, and find the checkpoint to resume from.

    Args:
        output_dir: where the run will write.
        resume_from_checkpoint: a checkpoint folder; True or `"true"` for the last one of `output_dir`; None or False
            for a new run.

    Returns:
        The checkpoint to resume from, or None for a new run.

    Raises:
        FileExistsError: a new run, but `output_dir` holds another one.
        FileNotFoundError: the checkpoint does not exist or is incomplete.
    """
    folder = Path(output_dir)
    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[1].isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.split("-")[1]))
    resume = str(resume_from_checkpoint or "")
    if resume.lower() in ("", "false"):
        if checkpoints or any((folder / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
            raise FileExistsError(
                f"'{folder}' holds another run. Resume it with --resume_from_checkpoint true, or choose another "
                f"--output_dir."
            )
        return None
    if resume.lower() == "true":
        whole = [path for path in checkpoints if (path / TRAINER_STATE_NAME).exists()]  # which comes last
        if not whole:
            raise FileNotFoundError(f"'{folder}' holds no checkpoint to resume from.")
        return str(whole[-1])
    if not Path(resume, TRAINER_STATE_NAME).exists():
        raise FileNotFoundError(f"'{resume}' is not a complete checkpoint: it has no trainer_state.json.")
    return resume


def check_free_disk(path: str | os.PathLike, needed: int) -> None:
    """
    Refuse to start a run that would fill the disk.

    Args:
        path: a file or folder that the run will write.
        needed: bytes.

    Raises:
        OSError: the disk has less free space.
    """
    existing = next(parent for parent in [Path(path).absolute(), *Path(path).absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{needed / 1e9:.1f} GB are needed at '{path}', {free / 1e9:.1f} GB are free. Free some space, choose "
            f"another folder, or keep fewer checkpoints (--save_total_limit)."
        )


__all__ = ["PAIR_COLUMNS", "check_free_disk", "check_output_dir", "load_pairs"]
