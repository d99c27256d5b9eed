"""Loading checkpoints: strict loading, PEFT folders of a repository, and adapters without their base."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..branches.detector import DETECTOR_FILE, Detector, read_detector
from ..branches.peft_folders import read_untrusted_json, some
from ..branches.tower import is_adapter_weight
from ..publishing.hub import WEIGHTS, hub_kwargs
from ..publishing.provenance import on_hub

# Upper limits for numbers in config.json, by parts of their names. Layers are created before any weights are read.
SIZE_LIMITS = {"layers": 1000, "heads": 1000, "image_size": 2**14, "hidden_size": 2**16, "intermediate_size": 2**18}


class StrictLoading:
    """Mixin for a `PreTrainedModel`: missing and unexpected weights are errors, and pickles are not read."""

    # The remedy for a checkpoint with a base's weights and without branches.
    _without_branches = "If it is a plain base model, add fresh branches with `from_base`."

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """
        Load a checkpoint of `save_pretrained`; arguments as in `PreTrainedModel`.

        Raises:
            ValueError: the weights in the checkpoint are not exactly those of this model, or some are not finite. No
                weights are initialised at random.
            OSError: the weights exist only as a pickle, see [`check_checkpoint`].
        """
        with_info = kwargs.pop("output_loading_info", False)
        check_checkpoint(pretrained_model_name_or_path, **hub_kwargs(kwargs))
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **{**kwargs, "use_safetensors": True}
        )
        check_nothing_missing(pretrained_model_name_or_path, info["missing_keys"], cls._without_branches)
        if info["unexpected_keys"]:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' has weights that do not fit its configuration: "
                f"{some(info['unexpected_keys'])}. Check `trainable_modalities`, `lora_targets` and `text_lora`."
            )
        check_finite(model, pretrained_model_name_or_path)
        model.after_loading()
        return (model, info) if with_info else model

    def after_loading(self) -> None:
        """Set which parameters train. Loading replaces the parameters that the constructor froze."""


def check_nothing_missing(
    source: str | os.PathLike, missing: set[str], without_branches: str = StrictLoading._without_branches
) -> None:
    """
    Refuse a checkpoint that lacks weights. transformers would initialise them at random with a warning.

    Args:
        source: the checkpoint's name.
        missing: the missing weights.
        without_branches: the remedy if weights of branches are missing.

    Raises:
        ValueError: weights are missing.
    """
    if missing:
        no_branches = any(map(is_adapter_weight, missing))
        remedy = without_branches if no_branches else "The files are incomplete: download or save them again."
        raise ValueError(f"'{source}' lacks {some(missing)}. {remedy}")


def check_checkpoint(source: str | os.PathLike, **hub: Any) -> None:
    """
    Refuse invalid or hostile files of a model, before memory is allocated for it.

    Args:
        source: a folder or Hub id.
        hub: `revision`, `token`, `cache_dir` and other arguments for downloads.

    Raises:
        OSError: the weights are incomplete, or exist only as a pickle; the message shows the remedy.
        ValueError: config.json has implausible sizes, the index names files in other folders, or weights are integers.
    """

    def found(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)

    folder = Path(source)
    pickle = next((file for file in sorted(folder.glob("*.bin")) if file.name.startswith("pytorch_model")), None)
    if pickle and not any((folder / name).exists() for name in WEIGHTS):
        raise OSError(
            f"'{folder}' has {pickle.name} and no {SAFE_WEIGHTS_NAME}. Pickles are not read, because they can run "
            f"code. If you trust the file, convert it: `from transformers import AutoModel; "
            f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')`."
        )
    if config := found(CONFIG_NAME):
        _check_sizes(read_untrusted_json(config), config)
    files = [SAFE_WEIGHTS_NAME]
    if not found(SAFE_WEIGHTS_NAME) and (index := found(SAFE_WEIGHTS_INDEX_NAME)):
        content = read_untrusted_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        outside = [name for name in files if Path(name).name != name]
        if outside or not files:
            raise ValueError(f"{index} names files that are not next to it: {some(outside)}.")
    for name in files:
        if path := found(name):
            try:
                with safe_open(path, framework="pt") as tensors:
                    integers = [key for key in tensors.keys() if "F" not in tensors.get_slice(key).get_dtype()]
            except SafetensorError as error:
                raise OSError(
                    f"{path} is incomplete ({error}): a training was killed while it saved its model, or a download "
                    "was cut. Resume the training with --resume_from_checkpoint true, or download or save it again."
                ) from error
            integers = [key for key in integers if not key.endswith("position_ids")]  # in early CLIPs
            if integers:
                raise ValueError(f"{path} has weights that are not floating-point numbers: {some(integers)}.")


def _check_sizes(values: Any, file: str) -> None:
    items = values.items() if isinstance(values, dict) else ()
    for key, value in items:
        limit = next((limit for part, limit in SIZE_LIMITS.items() if part in key), None)
        if isinstance(value, (int, float)) and limit is not None and not value <= limit:
            raise ValueError(f"{file} has {key}={value}; the limit is {limit}.")
        _check_sizes(value, file)


def check_finite(model: torch.nn.Module, source: str | os.PathLike) -> None:
    """
    Check the weights of a model.

    Raises:
        ValueError: weights are NaN or infinite.
    """
    bad = [
        name
        for name, weight in model.named_parameters()
        if not weight.is_meta and not weight.detach().isfinite().all()
    ]
    if bad:
        raise ValueError(f"'{source}' has weights that are not finite: {some(bad)}.")


def adapter_files(source: str | os.PathLike, name: str, **kwargs: Any) -> tuple[str, str] | None:
    """Paths of the two files of the PEFT folder `name`, downloaded if needed; None if the folder does not exist."""
    kwargs["subfolder"] = os.path.join(kwargs.get("subfolder", ""), name)
    config_file = cached_file(source, "adapter_config.json", _raise_exceptions_for_missing_entries=False, **kwargs)
    if config_file is None:
        return None
    return config_file, cached_file(source, "adapter_model.safetensors", **kwargs)


def missing_adapter(source: str | os.PathLike, name: str) -> OSError:
    files = f"{name}/adapter_config.json and {name}/adapter_model.safetensors"
    return OSError(f"'{source}' has no adapter '{name}': expected {files}.")


def find_detector(model: torch.nn.Module, source: str | os.PathLike, **kwargs: Any) -> Detector | None:
    """The detector in a repository or folder, downloaded if need be and checked; None if there is none."""
    file = cached_file(source, DETECTOR_FILE, _raise_exceptions_for_missing_entries=False, **kwargs)
    return None if file is None else read_detector(model, file)


def adapters_config(
    source: str | os.PathLike | None, kwargs: dict[str, Any], config_class: type[PreTrainedConfig]
) -> PreTrainedConfig | None:
    """
    The configuration of a repository or folder with PEFT folders and without weights of their base, else None.

    Args:
        source: its Hub id or path.
        kwargs: the arguments of `from_pretrained`.
        config_class: the configuration class of a complete model with branches.

    Raises:
        OSError: the repository cannot be accessed, or has neither PEFT folders nor weights.
    """
    if source is None or any(kwargs.get(key) for key in ("state_dict", "gguf_file", "variant")):
        return None
    hub = hub_kwargs(kwargs)
    for name in WEIGHTS:
        if cached_file(source, name, _raise_exceptions_for_missing_entries=False, **{**hub, "force_download": False}):
            return None
    check_checkpoint(source, **hub)
    config = kwargs.get("config")
    if not isinstance(config, config_class):
        config = config_class.from_pretrained(source, **hub)
    if adapter_files(source, config.modalities[0], **hub):
        return config
    if os.path.isdir(source):
        return None
    at = f" at revision {hub['revision']}" if hub.get("revision") else ""
    raise OSError(
        f"Found neither {SAFE_WEIGHTS_NAME} nor {config.modalities[0]}/adapter_config.json in '{source}'{at}. "
        "Check that it is the repository of a model with branches and that its upload was completed, or if you are "
        "offline, that it is in the cache."
    )


def base_arguments(
    source: str | os.PathLike, config: PreTrainedConfig, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """
    The base of the adapters in `source`, and the arguments to load it with.

    Raises:
        ValueError: `config` does not name the base.
    """
    base = config.base_model_name_or_path
    if base is None:
        raise ValueError(
            f"'{source}' contains only adapters, and its config.json names no base. Load the model that they were "
            "trained on with `from_base`, then the adapters with `load_adapters`."
        )
    hub = hub_kwargs(kwargs)
    rest = {key: value for key, value in kwargs.items() if key not in (*hub, "config", "adapter_kwargs")}
    dtype = rest.pop("torch_dtype", None) or config.dtype
    at_base = {key: value for key, value in hub.items() if key != "subfolder"}
    defaults = {"dtype": dtype, "attn_implementation": config._attn_implementation}
    return base, {**defaults, **rest, **at_base, "revision": config.base_model_revision}


def load_processor(name: str | os.PathLike, revision: str | None = None) -> Any:
    """Load the processor of a model, or of its base for adapters that were saved without a processor."""
    hub = {"revision": revision} if revision else {}
    try:
        return AutoProcessor.from_pretrained(name, **hub)
    except (OSError, ValueError):
        config = AutoConfig.from_pretrained(name, **hub)
        base = getattr(config, "base_model_name_or_path", None)
        if base is None:
            raise
        return AutoProcessor.from_pretrained(base, revision=config.base_model_revision or "main")


def check_adapters_can_load(folder: str | os.PathLike, config: PreTrainedConfig, push_to_hub: bool) -> None:
    """
    Check that adapters saved in `folder` can be loaded from there, and if they are pushed, also by others.

    Raises:
        ValueError: weights in `folder` would be loaded instead, or others cannot download the base.
    """
    if any(Path(folder, name).exists() for name in WEIGHTS):
        raise ValueError(
            f"'{folder}' has a complete checkpoint, which would be loaded instead of these adapters. Save the "
            "complete model with `save_pretrained`, or choose another folder."
        )
    base = config.base_model_name_or_path
    if push_to_hub and not on_hub(base):
        named = "which config.json does not name" if base is None else f"'{base}'"
        raise ValueError(
            f"Others cannot download the base of these adapters, {named}. Push the complete model with "
            "`push_to_hub`, or create it with `from_base` from a model on the Hub, without `subfolder`."
        )
