"""Between [`GmailCLIPModel`] and the Hub: adapters without their base, uploads."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from transformers import PreTrainedModel
from transformers.safetensors_conversion import auto_conversion
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..models.configuration_clip import OWN_FIELDS, GmailConfig
from .marker import card_of_others, own_card
from .model_cards import write_card
from .provenance import on_hub

# Keywords of `from_pretrained` that say where files come from.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What a training run leaves in the folder of its model, and pickles.
TRAINING_FILES = ["checkpoint-*", "runs/", "*.pt", "*.pth", "*.bin"]
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def resolve_commit(source: str | os.PathLike, kwargs: dict[str, Any]) -> str | None:
    """
    The commit that a Hub id and `revision` mean now; None for a folder.

    Where its weights are a pickle alone, that of the pull request by which the Hub's service has added safetensors.

    Raises:
        OSError: there are no safetensors; pickles are not read.
    """
    if os.path.isdir(source):
        return None
    hub = _hub_kwargs(kwargs)
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


def adapter_files(source: str | os.PathLike, name: str, **kwargs: Any) -> tuple[str, str] | None:
    """Paths of the two files of the PEFT folder `name`, downloaded if need be; None if there is no such folder."""
    kwargs["subfolder"] = os.path.join(kwargs.get("subfolder", ""), name)
    config_file = cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **kwargs)
    if config_file is None:
        return None
    return config_file, cached_file(source, "adapter_model.safetensors", **kwargs)


def adapters_config(source: str | os.PathLike | None, kwargs: dict[str, Any]) -> GmailConfig | None:
    """
    The configuration of a repository or folder that holds PEFT folders and no weights of their base, else None.

    Args:
        source: its Hub id or path.
        kwargs: what `from_pretrained` was given.

    Raises:
        OSError: no access to the repository, or it holds neither.
    """
    if source is None or any(kwargs.get(key) for key in ("state_dict", "gguf_file", "variant")):
        return None
    hub = _hub_kwargs(kwargs)
    for name in WEIGHTS:
        if cached_file(source, name, _raise_exceptions_for_missing_entries=False, **{**hub, "force_download": False}):
            return None
    config = kwargs.get("config")
    if not isinstance(config, GmailConfig):
        config = GmailConfig.from_pretrained(source, **hub)
    if adapter_files(source, config.modalities[0], **hub):
        return config
    if os.path.isdir(source):
        return None
    at = f" at revision {hub['revision']}" if hub.get("revision") else ""
    raise OSError(
        f"Found neither {SAFE_WEIGHTS_NAME} nor {config.modalities[0]}/adapter_config.json in '{source}'{at}: is it a "
        "GmailCLIPModel's repository, and was its push completed? Offline, is it in the cache?"
    )


def load_on_base(
    model_class: type[PreTrainedModel], source: str | os.PathLike, config: GmailConfig, **kwargs: Any
) -> PreTrainedModel:
    """
    Fetch the base that `config` names, at its commit, and put the adapters of `source` on it.

    Raises:
        OSError: the base does not load.
        ValueError: `config` names none; it has other weights than the one that the adapters were trained on.
    """
    base, revision = config.base_model_name_or_path, config.base_model_revision
    if base is None:
        raise ValueError(
            f"'{source}' holds adapters alone, and its config.json names no base: put them on the CLIP that they were "
            "trained on by `from_clip` and `load_adapters`."
        )
    hub = _hub_kwargs(kwargs)
    for key in (*hub, "adapter_kwargs"):  # the Auto classes pass the latter, about adapters in the root
        kwargs.pop(key, None)
    fields = {field: getattr(config, field) for field in OWN_FIELDS}
    fields |= {
        "dtype": kwargs.pop("torch_dtype", None) or config.dtype,
        "attn_implementation": config._attn_implementation,
    }
    at_base = {key: value for key, value in hub.items() if key != "subfolder"} | {"revision": revision}
    try:
        model = model_class.from_clip(base, **at_base, **{**fields, **kwargs})
    except OSError as error:
        at = f" at revision {revision}" if revision else ""
        raise OSError(f"'{source}' holds adapters alone; their base '{base}'{at} did not load: {error}") from error
    model.load_adapters(source, **hub)
    model.name_or_path = model.config.name_or_path = str(source)
    return model


def check_stands_alone(folder: str | os.PathLike, config: GmailConfig, push_to_hub: bool) -> None:
    """
    Check that adapters saved in `folder` will be what is loaded from there, by others too if they are pushed.

    Raises:
        ValueError: weights in `folder` would hide them, or nobody else can fetch their base.
    """
    if any(Path(folder, name).exists() for name in WEIGHTS):
        raise ValueError(
            f"'{folder}' holds a whole checkpoint, which would go on being loaded in place of these adapters: save "
            "the whole model by `save_pretrained`, or choose another folder."
        )
    base = config.base_model_name_or_path
    if push_to_hub and not on_hub(base):
        raise ValueError(
            f"Nobody else can fetch the base of these adapters, '{base}': push the whole model by `push_to_hub`, or "
            "make it by `from_clip` from a CLIP on the Hub."
        )


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

    Keywords as in `PreTrainedModel.push_to_hub`, and `card`: fields of a card that is written anew.

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


def _hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
