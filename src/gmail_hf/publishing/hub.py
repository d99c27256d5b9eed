"""Uploads to the Hub, and the commits of Hub ids."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, is_offline_mode
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from transformers.safetensors_conversion import auto_conversion
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .marker import card_of_others, own_card
from .model_cards import take_card, write_card
from .provenance import PROVENANCE, without_paths

# Keywords of `from_pretrained` that select the files to load.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.distcp", ".metadata")  # files of torch.save and of distributed checkpoints
# What a training run leaves in the folder of its model. Logs (runs/) name folders of the machine.
TRAINING_FILES = ("_*", "checkpoint-*", "runs/", "*.part", *PICKLES)
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of `from_pretrained` that select the files to load."""
    return {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}


def resolve_commit(source: str | os.PathLike, kwargs: dict[str, Any]) -> str | None:
    """
    Return the current commit of a Hub id and `revision`, or None for a folder.

    If the weights are only a pickle, return the commit of the pull request in which the Hub's conversion service added
    safetensors.

    Raises:
        OSError: there are no safetensors. Pickles are not read.
    """
    if os.path.isdir(source):
        return None
    hub = hub_kwargs(kwargs)
    commit = extract_commit_hash(cached_file(source, CONFIG_NAME, **hub), None)
    if kwargs.get("variant"):  # the files of a variant have other names
        return commit
    hub |= {"revision": commit, "force_download": False}
    if any(cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub) for name in WEIGHTS):
        return commit
    none = f"'{source}' has no safetensors weights at revision {commit}, and pickles are not read"
    if kwargs.get("revision") not in (None, "main") or is_offline_mode():
        raise OSError(f"{none}: leave out `revision` to look for converted weights, or pass `refs/pr/...`.")
    try:
        converted, _, _ = auto_conversion(source, **hub)
    except Exception as error:  # the network, or the conversion service
        raise OSError(f"{none}; the Hub's conversion service failed: {error}") from error
    return extract_commit_hash(converted, None)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    adapters_only: bool = False,
    card: dict[str, Any] | None = None,
    revision: str | None = None,
    **commit: Any,
) -> str:
    """
    Upload a folder in one commit, with the files of [`public_files`]. A card on the Hub that a user edited is kept,
    unless the folder also has a card that a user wrote or edited. So is the card of the training of these weights,
    unless the folder has the records of that training.

    Keywords as in `PreTrainedModel.push_to_hub`, and `card`: fields of a card that is written again.

    Returns:
        The commit's address.

    Raises:
        ValueError: `adapters_only`, but the repository holds weights, which `from_pretrained` would prefer.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id or Path(folder).name, private=private, exist_ok=True).repo_id
    if revision and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if adapters_only and any(api.file_exists(repo_id, name, revision=revision) for name in WEIGHTS):
        raise ValueError(
            f"'{repo_id}' has a complete checkpoint, which `from_pretrained` would load instead of these adapters: "
            "push the complete model with `push_to_hub`, or choose another repository."
        )
    ignore, mine = list(TRAINING_FILES), own_card(folder)
    if not mine and card_of_others(repo_id, token=token) is not None:
        ignore.append("README.md")
    elif not mine and (card is not None or not Path(folder, PROVENANCE).exists()):
        taken = take_card(folder, repo_id, token, (card or {}).get("tags"))
        if card is not None and not taken:
            write_card(folder, repo_id, **card)
    commit.setdefault("commit_message", "Upload model")
    return api.create_commit(repo_id, public_files(folder, ignore), revision=revision, **commit)


def public_files(
    folder: str | os.PathLike, ignore_patterns: Iterable[str] = TRAINING_FILES
) -> list[CommitOperationAdd]:
    """
    Return the files of a folder for a commit.

    Absolute paths in JSON files, which reveal folders of this machine and often its user, are reduced to their last
    part, see [`provenance.without_paths`]. The files in the folder are not changed.

    Args:
        folder: folder of a model or of a training.
        ignore_patterns: files to exclude, as in `HfApi.upload_folder`.
    """
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = filter_repo_objects(names, ignore_patterns=[*ignore_patterns, *DEFAULT_IGNORE_PATTERNS])
    return [CommitOperationAdd(name, _public_json(folder / name) or str(folder / name)) for name in names]


def _public_json(path: Path) -> bytes | None:
    """Return the content of a JSON file without paths, or None if it has none or the file has another format."""
    if path.suffix != ".json" or path.name == "tokenizer.json":  # the strings of a tokenizer are tokens
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a file of the user that is not valid JSON
        return None
    public = without_paths(content)
    return None if public == content else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()
