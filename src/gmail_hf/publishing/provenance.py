"""A model's origin for its card: base, data, licences, machine. The Trainer saves it as provenance.json."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, IterableDataset
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from huggingface_hub.repocard import RepoCard
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from ..metrics.environment import environment

PROVENANCE = "provenance.json"
PAPER = "https://arxiv.org/abs/2602.15368"
CITATION = """@inproceedings{mo2025gmail,
  title     = {{GMAIL}: Generative Modality Alignment for generated Image Learning},
  author    = {Mo, Shentong and Yun, Sukmin},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2602.15368}
}"""
PACKAGE = Path(__file__).parents[1]
# Names with one of these endings are files, never Hub ids.
DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".tar", ".txt", ".zip", ".gz")


def provenance(
    config: Any, datasets: Mapping[str, Dataset | IterableDataset | None], processes: int
) -> dict[str, Any]:
    """
    Collect what a card reports about a training except its settings and scores.

    Args:
        config ([`GmailConfig`]): configuration of the model.
        datasets: data sets by role: `train_dataset`, and `eval_dataset` or the names of several.
        processes: number of training processes.

    Returns:
        `base`, `datasets` by role, `processes` and `environment`, for JSON. Local folders are reduced to their last
        part, because a card is public.
    """
    return {
        "base": source(config.base_model_name_or_path, config.base_model_revision, "model"),
        "datasets": {name: _pairs(dataset) for name, dataset in datasets.items() if dataset is not None},
        "processes": processes,
        "environment": environment(),
    }


def weights_digest(folder: str | os.PathLike) -> str | None:
    """Return a digest of the adapters in a folder, or None if there are none."""
    digest, files = hashlib.blake2b(digest_size=16), sorted(Path(folder).glob("*/adapter_model.safetensors"))
    for file in files:
        for name, tensor in sorted(load_file(file).items()):  # not the header, whose order changes
            digest.update(f"{file.parent.name}/{name}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest() if files else None


def of_other_weights(folder: str | os.PathLike, known: dict[str, Any]) -> bool:
    """Whether the folder's adapters differ from the ones recorded in `provenance.json`, whose content is `known`."""
    return "weights" in known and weights_digest(folder) not in (None, known["weights"])


def name_pairs(known: dict[str, Any], name: str) -> None:
    """Set the name that the user gave for the training pairs and for other pairs from the same source."""
    datasets = known["datasets"]
    old = datasets["train_dataset"]["name"] if "train_dataset" in datasets else None
    for role, pairs in datasets.items():
        if role == "train_dataset" or pairs["name"] == old:
            pairs |= {"name": public_name(name), "on_hub": on_hub(name)}


def source(
    name: str | None, revision: str | None = None, repo_type: str = "model", licensed: bool = True
) -> dict[str, Any]:
    """Describe a Hub repository or a folder: `name`, `revision`, `on_hub`, and the `license` in its card."""
    return {
        "name": public_name(name),
        "revision": revision,
        "on_hub": on_hub(name),
        "license": _license(name, repo_type) if name and licensed else None,
    }


def generator_source(name: str, revision: str | None = None) -> dict[str, Any]:
    """As [`source`], for a text-to-image pipeline: a Hub id, a folder, or the name of a bundled pipeline."""
    return source(str(bundled_generator(name) or name), revision)


def bundled_generator(name: str | None) -> Path | None:
    """Return the folder `<name>/generator` of this package if it has a diffusers pipeline; otherwise None."""
    path = PACKAGE / str(name) / "generator"
    return path if (path / "model_index.json").exists() else None


def on_hub(name: str | None) -> bool:
    """Whether a name is a Hub id: `owner/name`, but not an existing path or a data file."""
    is_id = bool(name and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))
    return is_id and Path(name).suffix.lower() not in DATA_SUFFIXES and not Path(name).exists()


def local_path(name: str | os.PathLike, kind: str) -> Path | None:
    """
    Return a name as a path, or None for a Hub id.

    Args:
        name: path or Hub id.
        kind: noun for the error, such as `"data set"`.

    Raises:
        FileNotFoundError: `name` is neither an existing path nor a Hub id.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if on_hub(str(name)):
        return None
    raise FileNotFoundError(f"No {kind} at '{name}': this path does not exist. A Hub id has the form owner/name.")


def public_name(name: str | os.PathLike | None) -> str | None:
    """Return a name that reveals nothing about the machine: a Hub id unchanged, or the last part of a path."""
    if name is None or on_hub(str(name)):
        return name
    path = Path(name).absolute()
    return str(path.relative_to(PACKAGE.parent)) if path.is_relative_to(PACKAGE) else path.name


def name_publicly(config: PreTrainedConfig) -> None:
    """Apply [`public_name`] to the names in the parts of a configuration, which transformers saves and pushes."""
    for part in (getattr(config, key) for key in config.sub_configs):
        for field in ("name_or_path", "base_model_name_or_path"):
            if name := getattr(part, field, None):
                setattr(part, field, public_name(name))


def without_paths(content: Any) -> Any:
    """Return the content of a JSON file with [`public_name`] applied to each text that is an absolute path."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    return public_name(content) or content if isinstance(content, str) and os.path.isabs(content) else content


def _pairs(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """Return a data set's id, revision, licence and number of pairs, and the generators in its rows."""
    info = dataset.info
    found = _in_cache(dataset)
    if found:
        known = source(*found, "dataset")
    else:  # data from plain files is named after the file format
        own = info.dataset_name if info.dataset_name not in _PACKAGED_DATASETS_MODULES else None
        known = {**source(None), "name": own, "license": info.license or None}
    generators = set()
    if not found and bundled_generator(known["name"]):
        generators.add((known["name"], None))
    elif isinstance(dataset, Dataset) and {"generator", "generator_revision"} <= set(dataset.column_names):
        table = dataset.select_columns(["generator", "generator_revision"]).with_format("arrow")
        for rows in table.iter(batch_size=100_000):
            generators.update(zip(*(column.to_pylist() for column in rows.columns), strict=True))
    return {
        **known,
        "split": str(dataset.split) if dataset.split else None,
        "pairs": len(dataset) if isinstance(dataset, Dataset) else None,
        "generators": [generator_source(*generator) for generator in sorted(generators, key=str) if generator[0]],
    }


def _in_cache(dataset: Dataset | IterableDataset) -> tuple[str, str] | None:
    """
    Return the id, in lower case, and the commit of a Hub data set, from its path in the cache of `datasets`; None if
    the rows are from several sources.
    """
    found = set()
    for file in getattr(dataset, "cache_files", []):
        parts = Path(file["filename"]).parts  # .../org___name/configuration/version/commit/file
        cached = len(parts) > 5 and parts[-5].count("___") == 1 and re.fullmatch("[0-9a-f]{40}", parts[-2])
        found.add((parts[-5].replace("___", "/"), parts[-2]) if cached else None)
    return found.pop() if len(found) == 1 else None


def _license(name: str, repo_type: str) -> str | None:
    """Return the licence identifier in a repository's card, or None if it does not have exactly one."""
    path = Path(name, "README.md")
    if not path.exists() and not on_hub(name):
        return None
    try:
        path = path if path.exists() else name
        data = RepoCard.load(path, repo_type=repo_type, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # no connection, no card, or an invalid one
        return None
    licence = data.get("license")
    return licence if isinstance(licence, str) else None
