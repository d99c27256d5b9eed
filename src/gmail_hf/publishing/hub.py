"""Uploads to the Hub, and the commits that names there mean."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from transformers.safetensors_conversion import auto_conversion
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .marker import card_of_others, own_card
from .model_cards import write_card

# Keywords of `from_pretrained` that say where files come from.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What a training run leaves in the folder of its model, and pickles.
TRAINING_FILES = ["checkpoint-*", "runs/", "*.pt", "*.pth", "*.bin"]
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `from_pretrained` that say where files come from."""
    return {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}


def resolve_commit(source: str | os.PathLike, kwargs: dict[str, Any]) -> str | None:
    """
    The commit that a Hub id and `revision` mean now; None for a folder.

    Where its weights are a pickle alone, that of the pull request by which the Hub's service has added safetensors.

    Raises:
        OSError: there are no safetensors; pickles are not read.
    """
    if os.path.isdir(source):
        return None
    hub = hub_kwargs(kwargs)
    commit = extract_commit_hash(cached_file(source, CONFIG_NAME, **hub), None)
    if kwargs.get("variant"):  # whose files have other names
        return commit
    hub |= {"revision": commit, "force_download": False}
    if any(cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub) for name in WEIGHTS):
        return commit
    none = f"'{source}' has no safetensors weights at revision {commit}, and pickles are not read here"
    if kwargs.get("revision") not in (None, "main") or is_offline_mode():
        raise OSError(f"{none}: leave `revision` out to look for converted ones, or name `refs/pr/...` that has some.")
    try:
        converted, _, _ = auto_conversion(source, **hub)
    except Exception as error:  # of networks and of a service outside the Hub
        raise OSError(f"{none}; the Hub's conversion did not help: {error}") from error
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
    Upload a folder in one commit; a card on the Hub that somebody edited stays, unless the folder holds one like that.

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
            f"'{repo_id}' holds a whole checkpoint, which would go on being loaded in place of these adapters: push "
            "the whole model by `push_to_hub`, or choose another repository."
        )
    ignore = list(TRAINING_FILES)
    if not own_card(folder) and card_of_others(repo_id, token=token) is not None:
        ignore.append("README.md")
    elif card is not None:
        write_card(folder, repo_id, **card)
    commit.setdefault("commit_message", "Upload model")
    return api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=ignore, revision=revision, **commit)
