"""Creating, saving, loading and exporting a model with branches."""

import copy
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..branches.configuration import TEXT_ADAPTER, is_adapter_like
from ..branches.detector import write_detector
from ..branches.peft_folders import (
    base_signature,
    check_base,
    has_adapter,
    merged_state_dict,
    read_adapter,
    read_signature,
    some,
    write_adapter,
    write_peft_folder,
)
from ..branches.routing import change_class
from ..publishing.hub import hub_kwargs, push_folder, resolve_commit
from ..publishing.model_cards import add_card
from .loading import (
    StrictLoading,
    adapter_files,
    adapters_config,
    base_arguments,
    check_adapters_can_load,
    check_checkpoint,
    check_finite,
    find_detector,
    missing_adapter,
)

# Settings that must not change when training is resumed.
RESUMABLE = ("lora_rank", "lora_alpha", "lora_targets", "modalities", "trainable_modalities", "head", "text_lora")


def adopt(base: PreTrainedModel, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Change the class and the configuration of a loaded model, and add fresh branches."""
    config._attn_implementation = base.config._attn_implementation
    config.dtype = base.config.dtype
    # Layers refer to the configuration of their model.
    new = {id(base.config): config}
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(base.config, name, None)) is not None:
            new[id(part)] = getattr(config, name)
    for module in base.modules():
        if id(getattr(module, "config", None)) in new:
            module.config = new[id(module.config)]
    change_class(base, model_class)
    base.attach()
    for module in base.modules():
        module._is_hf_initialized = True  # a model that contains this one must not initialise it again
    return base.eval()


class GmailCheckpoints(StrictLoading):
    """
    Mixin for a [`GmailModel`] that reads and writes checkpoints.

    `base_class` is the plain model of transformers.
    """

    base_class: type[PreTrainedModel]

    @classmethod
    def from_base(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """
        Add fresh branches to a pretrained model. At first every branch equals that model, bit for bit.

        Args:
            pretrained_model_name_or_path: a Hub id or folder of a model of `base_class`.
            kwargs: fields of [`GmailConfig`], such as `lora_rank`. All others, such as `revision`, `dtype`,
                `device_map` and `attn_implementation`, are passed to the base's `from_pretrained`. Adapters do not
                record a `subfolder`: load the base with `from_base` again, then the adapters with `load_adapters`.

        Raises:
            ValueError: a field is unknown; the checkpoint is of another type, lacks weights or already has branches.
            huggingface_hub.errors.StrictDataclassClassValidationError: a field is out of range.
            OSError: the weights exist only as a pickle.
        """
        own = cls.config_class.own_fields()
        # Misspelled fields are included: the configuration refuses them.
        fields = {key: kwargs.pop(key) for key in list(kwargs) if key in own or is_adapter_like(key)}
        cls.config_class(**fields)  # checks the fields before the download
        if commit := resolve_commit(pretrained_model_name_or_path, kwargs):
            kwargs["revision"] = commit
        check_checkpoint(pretrained_model_name_or_path, **hub_kwargs(kwargs))
        cls._check_kind(pretrained_model_name_or_path, kwargs)
        # Saved adapters would look for a base from a subfolder in the main folder, so it has no name.
        if "base_model_name_or_path" not in fields and not kwargs.get("subfolder"):
            fields["base_model_name_or_path"] = str(pretrained_model_name_or_path)
            fields.setdefault("base_model_revision", kwargs.get("revision"))
        base, info = cls.base_class.from_pretrained(
            pretrained_model_name_or_path,
            output_loading_info=True,
            **{**cls.base_kwargs, **kwargs, "use_safetensors": True},
        )
        if info["missing_keys"]:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' is not a complete {cls.base_class.__name__}; it lacks "
                f"{some(info['missing_keys'])}."
            )
        check_finite(base, pretrained_model_name_or_path)
        return cls.adopt(base, **fields)

    @classmethod
    def _check_kind(cls, source: str | os.PathLike, kwargs: dict[str, Any]) -> None:
        """Refuse a model of another type by its configuration, before its weights are downloaded."""
        values, _ = cls.base_class.config_class.get_config_dict(source, **hub_kwargs(kwargs))
        kind, expected = values.get("model_type"), cls.base_class.config_class.model_type
        if "trainable_modalities" in values:
            raise ValueError(
                f"'{source}' already has adapters. Load it with `{cls.__name__}.from_pretrained`, or pass its base."
            )
        if kind is not None and kind != expected:
            raise ValueError(
                f"'{source}' is of type '{kind}', but {cls.__name__} needs '{expected}'. `gmail_hf.from_base` chooses "
                "the class for a base."
            )

    @classmethod
    def adopt(cls, base: PreTrainedModel, **fields: Any):
        """
        Add fresh branches to a loaded model, in place; the class of the object changes to this one.

        Args:
            base: a model of `base_class`.
            fields: fields of [`GmailConfig`].
        """
        return adopt(base, cls, cls.config_class.from_base_config(base.config, **fields))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """
        Load a checkpoint of `save_pretrained` or `save_adapters`. Arguments as in `PreTrainedModel`.

        For `save_adapters`, the base is loaded from the name and the commit in config.json, and checked to be the one
        that the adapters were trained on.

        Raises:
            ValueError: the weights in the checkpoint are not exactly those of this model (no weights are initialised
                at random), or the base has other weights than the one that the adapters were trained on.
            OSError: files of the checkpoint or of the base are missing or not accessible.
        """
        config = adapters_config(pretrained_model_name_or_path, kwargs, cls.config_class)
        with_info = kwargs.pop("output_loading_info", False)
        if config is None:
            source, hub = pretrained_model_name_or_path, hub_kwargs(kwargs)
            model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
            if source is not None:
                model.detector = find_detector(model, source, **hub)
            return (model, info) if with_info else model
        base, arguments = base_arguments(pretrained_model_name_or_path, config, kwargs)
        fields = {field: getattr(config, field) for field in config.own_fields()}
        try:
            model = cls.from_base(base, **{**fields, **arguments})
        except OSError as error:
            at = f" at revision {config.base_model_revision}" if config.base_model_revision else ""
            raise OSError(
                f"'{pretrained_model_name_or_path}' contains only adapters, and their base '{base}'{at} could not be "
                f"loaded: {error}"
            ) from error
        model.load_adapters(pretrained_model_name_or_path, **hub_kwargs(kwargs))
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, info) if with_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """
        Save the complete checkpoint and, in the same folder, each branch as a PEFT folder and the detector.

        The plain base class can load the folder, too. It gets the shared weights, which are the `real` branch unless
        `real` was trained. `PeftModel.from_pretrained(base, save_directory, subfolder="gen")` loads the `gen` branch.
        The arguments are those of `PreTrainedModel.save_pretrained`.
        """
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
        # Save by the names of this model's modules: `Trainer` could not resume from those of transformers 4.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        self._save_peft_folders(save_directory)
        add_card(save_directory, hub.get("repo_id"))
        if push_to_hub:
            # transformers would upload before the adapters are written.
            push_folder(save_directory, token=kwargs.get("token"), **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        **commit: Any,
    ) -> str:
        """
        Upload the complete checkpoint, the PEFT folders and, unless it was edited on the Hub, the card.

        The arguments are those of `PreTrainedModel.push_to_hub`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            tags = [*(tags or []), *(self.model_tags or [])]
            return push_folder(folder, repo_id, private, token, card={"tags": tags}, **commit)

    def save_adapters(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **hub_kwargs: Any) -> None:
        """
        Save the adapters and the configuration without the base, which `from_pretrained` downloads.

        Each branch, and the `text` adapter if there is one, is a PEFT folder `save_directory/<name>`. A branch without
        an adapter is saved as an adapter that has no effect. The detector of `modality="auto"` is one file.

        Args:
            save_directory: the folder.
            push_to_hub (`bool`): upload the folder in one commit.
            hub_kwargs: `repo_id` (defaults to the folder's name), `private`, `token`, `commit_message`, `create_pr`.

        Raises:
            ValueError: the folder or the repository has a complete checkpoint, which would be loaded instead; or
                `push_to_hub` with adapters whose base is a local folder.
        """
        check_adapters_can_load(save_directory, self.config, push_to_hub)
        config = copy.deepcopy(self.config)
        config.architectures, config.dtype = [type(self).__name__], self.dtype
        config.save_pretrained(save_directory)
        self._save_peft_folders(save_directory)
        add_card(save_directory, hub_kwargs.get("repo_id"))
        if push_to_hub:
            push_folder(save_directory, adapters_only=True, **hub_kwargs)

    def _save_peft_folders(self, save_directory: str | os.PathLike) -> None:
        signature = json.dumps(base_signature(self))
        for name in self._adapter_folders():
            write_peft_folder(self, name, Path(save_directory, name), signature)
        write_detector(self, save_directory)

    def load_adapters(
        self, pretrained_model_name_or_path: str | os.PathLike, modality: str | None = None, **hub_kwargs: Any
    ) -> None:
        """
        Load PEFT folders into this model's branches, and its detector. All files are checked before the model changes.

        Args:
            pretrained_model_name_or_path: a Hub id or folder with a PEFT folder per branch, as saved by
                `save_adapters`; with `modality`, it may be a PEFT folder.
            modality (`str`, *optional*): load only this branch (or `"text"`).
            hub_kwargs: `revision`, `token`, `cache_dir` and other arguments for downloads.

        Raises:
            ValueError: unknown modality; an adapter or the detector has another base, rank or scale; weights are
                missing, unexpected or not finite; a branch in the folder was trained, but this model has no adapter
                for it.
            OSError: a file is missing or damaged.
        """
        source = pretrained_model_name_or_path
        if modality is not None and modality not in self._adapter_folders():
            raise ValueError(f"Unknown modality '{modality}'; this model's adapters are {self._adapter_folders()}.")
        folders = [modality] if modality else [*self.config.modalities, TEXT_ADAPTER]
        loaded: dict[str, dict[str, torch.Tensor]] = {}
        for name in folders:
            files = adapter_files(source, name, **hub_kwargs)
            if files is None and modality:
                files = adapter_files(source, "", **hub_kwargs)
            if files is not None:
                loaded[name] = read_adapter(self, name, *files)
            elif modality or has_adapter(self, name):
                raise missing_adapter(source, name)
        if modality is None:
            self.detector = find_detector(self, source, **hub_kwargs) or self.detector
        for name, tensors in loaded.items():
            if has_adapter(self, name):
                write_adapter(self, name, tensors)

    def _adapter_folders(self) -> list[str]:
        text = [TEXT_ADAPTER] if has_adapter(self, TEXT_ADAPTER) else []
        return [*self.config.modalities, *text]

    def to_base(self, modality: str) -> PreTrainedModel:
        """
        Export one branch as a plain model of `base_class`, with its adapter and the `text` adapter merged.

        Raises:
            ValueError: unknown modality.
        """
        self.tower.check_modalities([modality])
        config = self.config.plain()
        attention = self.config._attn_implementation
        options = {**self.base_kwargs, "dtype": self.dtype, "attn_implementation": attention}
        base = self.base_class._from_config(config, **options)
        weights = merged_state_dict(self, [modality, TEXT_ADAPTER])
        base.load_state_dict({key: weights[key] for key in base.state_dict()})
        return base.to(self.device).eval()

    def check_resumable(self, checkpoint: str | os.PathLike) -> None:
        """
        Check that a training checkpoint has the base and the adapter settings of this model.

        Raises:
            ValueError: it does not. Loading its weights would silently give another model.
        """
        theirs = self.config_class.from_pretrained(checkpoint)
        for field in RESUMABLE:
            saved, ours = getattr(theirs, field, None), getattr(self.config, field, None)
            if field == "lora_targets":  # the order has no meaning
                saved, ours = sorted(saved or []), sorted(ours or [])
            if saved != ours:
                raise ValueError(
                    f"'{checkpoint}' was trained with {field}={saved}, but this model has {ours}. Resume with the "
                    "original settings."
                )
        weights_file = Path(checkpoint, self.config.modalities[0], "adapter_model.safetensors")
        check_base(self, str(weights_file), theirs.base_model_name_or_path, read_signature(weights_file))
