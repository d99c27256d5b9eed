"""How a two-branch CLIP is made, stored and exported: from CLIP checkpoints, as PEFT folders, to plain CLIPs."""

import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from ..publishing.hub import (
    adapter_files,
    adapters_config,
    check_stands_alone,
    load_on_base,
    push_folder,
    resolve_commit,
)
from ..publishing.model_cards import add_card
from .configuration_clip import (
    ADAPTER_FIELDS,
    OWN_FIELDS,
    TEXT_ADAPTER,
    GmailConfig,
    GmailVisionConfig,
    is_adapter_like,
)
from .layers import ModalityLoRALinear

PEFT_PREFIX = "base_model.model."
PROJECTION = "visual_projection"
# A few numbers of each weight of the base CLIP, stored with each adapter: they tell another base, at any precision.
SIGNATURE = "gmail_base_signature"
SIGNATURE_SIZE = 4
# Rounding weights to bfloat16 moves them by about 0.0011 of their size; a merged adapter or fine-tuning moves more.
SIGNATURE_TOLERANCE = 0.003


class AdapterMixin:
    """The part of [`GmailCLIPModel`] that reads and writes checkpoints."""

    @classmethod
    def from_clip(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """
        Put fresh adapters on a pretrained CLIP; every branch then equals that CLIP bit for bit.

        Args:
            pretrained_model_name_or_path: a Hub id or folder of any `CLIPModel`.
            kwargs: fields of [`GmailConfig`], such as `lora_rank`; anything else goes to
                `CLIPModel.from_pretrained`, such as `revision`, `dtype`, `attn_implementation`.

        Raises:
            ValueError: an invalid field, a checkpoint that lacks weights of a `CLIPModel` or has adapters already.
        """
        # A field that is ours but for a typing error goes to GmailConfig too, which knows to refuse it.
        fields = {key: kwargs.pop(key) for key in list(kwargs) if key in OWN_FIELDS or is_adapter_like(key)}
        GmailConfig(**fields)  # a wrong field is told before the download
        if commit := resolve_commit(pretrained_model_name_or_path, kwargs):
            kwargs["revision"] = commit
        if "base_model_name_or_path" not in fields:
            fields["base_model_name_or_path"] = str(pretrained_model_name_or_path)
            fields.setdefault("base_model_revision", kwargs.get("revision"))
        clip, info = CLIPModel.from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **{**kwargs, "use_safetensors": True}
        )
        if info["missing_keys"]:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' is no complete CLIPModel; it lacks {_some(info['missing_keys'])}."
            )
        if hasattr(clip.config, "trainable_modalities"):
            raise ValueError(
                f"'{pretrained_model_name_or_path}' has adapters already; load it with "
                "`GmailCLIPModel.from_pretrained`, or name the CLIP that it was made from."
            )
        config = GmailConfig.from_clip_config(clip.config, **fields)
        model = cls._from_config(config, dtype=clip.dtype, attn_implementation=clip.config._attn_implementation)
        model.load_state_dict({**model.state_dict(), **clip.state_dict()})
        model.visual_projection.reset_branches()
        return model.to(clip.device).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """
        Load what [`~GmailCLIPModel.save_pretrained`] or [`~GmailCLIPModel.save_adapters`] wrote.

        The latter is a few megabytes: the CLIP that its config.json names comes from the Hub, at the commit named
        there, and is checked to be the one that the adapters were trained on. Arguments as in `PreTrainedModel`.

        Raises:
            ValueError: the checkpoint's weights are not exactly this model's, nothing is made up at random; the base
                has other weights than the one that the adapters were trained on.
            OSError: files are missing, or there is no access to them; the same of the base.
        """
        with_info = kwargs.pop("output_loading_info", False)
        if config := adapters_config(pretrained_model_name_or_path, kwargs):
            model = load_on_base(cls, pretrained_model_name_or_path, **{**kwargs, "config": config})
            info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
            return (model, info) if with_info else model
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **{**kwargs, "use_safetensors": True}
        )
        check_nothing_missing(pretrained_model_name_or_path, info["missing_keys"])
        if info["unexpected_keys"]:
            raise ValueError(
                f"'{pretrained_model_name_or_path}' holds weights that this configuration has no place for: "
                f"{_some(info['unexpected_keys'])}. Check `trainable_modalities`, `lora_targets` and `text_lora`."
            )
        model.freeze_base()
        return (model, info) if with_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """
        Write the whole checkpoint and, beside it, each branch as a PEFT folder.

        `CLIPModel.from_pretrained(save_directory)` gives the shared CLIP, which is the `real` branch unless that one
        was trained; `PeftModel.from_pretrained(clip, save_directory, subfolder="gen")` gives the `gen` branch.
        Arguments are those of `PreTrainedModel.save_pretrained`.
        """
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
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
        Upload the whole checkpoint, the PEFT folders and the card, unless somebody edited that one on the Hub.

        Arguments are those of `PreTrainedModel.push_to_hub`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            tags = [*(tags or []), *(self.model_tags or [])]
            return push_folder(folder, repo_id, private, token, card={"tags": tags}, **commit)

    def save_adapters(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **hub_kwargs: Any) -> None:
        """
        Write the adapters and the configuration, without the base: `from_pretrained` fetches that.

        Each branch, and the `text` adapter if there is one, is a PEFT folder `save_directory/<name>`; a branch without
        an adapter is written as one that changes nothing.

        Args:
            save_directory: the folder.
            push_to_hub (`bool`): upload the folder then, in one commit.
            hub_kwargs: `repo_id` (by default the folder's name), `private`, `token`, `commit_message`, `create_pr`.

        Raises:
            ValueError: the folder or the repository holds a whole checkpoint, which would go on being loaded; a push,
                but the base is a folder of this machine.
        """
        check_stands_alone(save_directory, self.config, push_to_hub)
        config = copy.deepcopy(self.config)
        config.architectures, config.dtype = [type(self).__name__], self.dtype
        config.save_pretrained(save_directory)
        self._save_peft_folders(save_directory)
        add_card(save_directory, hub_kwargs.get("repo_id"))
        if push_to_hub:
            push_folder(save_directory, adapters_only=True, **hub_kwargs)

    def _save_peft_folders(self, save_directory: str | os.PathLike) -> None:
        from peft import LoraConfig

        signature = {"format": "pt", SIGNATURE: json.dumps(self._base_signature())}
        for name in self._adapter_folders():
            folder = Path(save_directory, name)
            folder.mkdir(parents=True, exist_ok=True)
            tower = "text_model" if name == TEXT_ADAPTER else "vision_model"
            LoraConfig(
                r=self.config.lora_rank,
                lora_alpha=self.config.lora_alpha,
                lora_dropout=self.config.lora_dropout,
                target_modules=rf"{tower}\.encoder\.layers\.\d+\.\w+\.({'|'.join(self.config.lora_targets)})",
                modules_to_save=None if name == TEXT_ADAPTER else [PROJECTION],
                base_model_name_or_path=self.config.base_model_name_or_path,
                revision=self.config.base_model_revision,
                inference_mode=True,
            ).save_pretrained(folder)
            weights = {key: tensor.detach().contiguous() for key, tensor in self._peft_tensors(name).items()}
            # Written beside and renamed: an interrupted save leaves the old file whole.
            partial = folder / "adapter_model.safetensors.part"
            save_file(weights, partial, metadata=signature)
            os.replace(partial, folder / "adapter_model.safetensors")

    def load_adapters(
        self, pretrained_model_name_or_path: str | os.PathLike, modality: str | None = None, **hub_kwargs: Any
    ) -> None:
        """
        Load PEFT folders into this model's branches. Everything is checked before a weight changes.

        Args:
            pretrained_model_name_or_path: a Hub id or folder with a PEFT folder for each branch, as
                [`~GmailCLIPModel.save_adapters`] writes it; with `modality`, also a PEFT folder itself.
            modality (`str`, *optional*): load this branch (or `"text"`) alone.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like.

        Raises:
            ValueError: unknown modality; an adapter of another base, rank or scale; missing or unexpected keys; a
                trained branch in the folder that this model has no adapter for.
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
                loaded[name] = self._read_adapter(name, *files)
            elif modality or self._has_adapter(name):
                raise OSError(
                    f"'{source}' holds no adapter '{name}': expected {name}/adapter_config.json and "
                    f"{name}/adapter_model.safetensors."
                )
        with torch.no_grad():
            for name, tensors in loaded.items():
                if not self._has_adapter(name):
                    continue  # the folder stands for the base, maybe at another precision
                for key, parameter in self._peft_tensors(name).items():
                    parameter.copy_(tensors.get(key, self.visual_projection.weight))

    def to_clip(self, modality: str) -> CLIPModel:
        """
        One branch as a plain `transformers.CLIPModel`, its adapter merged into the weights (with `text`'s, if any).

        Raises:
            ValueError: unknown modality.
        """
        self.vision_model.check_modalities([modality])
        config = {key: value for key, value in self.config.to_dict().items() if key in CLIPConfig.__dataclass_fields__}
        config["vision_config"] = plain_vision_config(self.config.vision_config)
        for key in ("model_type", "architectures", "transformers_version"):
            config.pop(key, None)
        attention = self.config._attn_implementation
        clip = CLIPModel._from_config(CLIPConfig(**config), dtype=self.dtype, attn_implementation=attention)
        weights = self.state_dict() | merged_linears(self, [modality, TEXT_ADAPTER])
        weights[f"{PROJECTION}.weight"] = self.visual_projection.branches.get(modality, self.visual_projection.weight)
        clip.load_state_dict({key: weights[key] for key in clip.state_dict()})
        return clip.to(self.device).eval()

    def _adapter_folders(self) -> list[str]:
        return [*self.config.modalities, *([TEXT_ADAPTER] if self.config.text_lora else [])]

    def _has_adapter(self, name: str) -> bool:
        return self.config.text_lora if name == TEXT_ADAPTER else name in self.config.trainable_modalities

    def _peft_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """The adapter's weights under PEFT's names; zeros and CLIP's projection for a branch that has none."""
        tensors = {}
        tower = "text_model." if adapter == TEXT_ADAPTER else "vision_model."
        for name, linear in _lora_linears(self):
            if not name.startswith(tower) or name.rpartition(".")[-1] not in self.config.lora_targets:
                continue
            if adapter in linear.adapters:
                lora_A, lora_B = linear.adapters[adapter].lora_A, linear.adapters[adapter].lora_B
            else:
                lora_A = linear.weight.new_zeros(linear.rank, linear.in_features)
                lora_B = linear.weight.new_zeros(linear.out_features, linear.rank)
            tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = lora_A
            tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = lora_B
        if adapter != TEXT_ADAPTER:
            branches = self.visual_projection.branches
            own = branches[adapter] if adapter in branches else self.visual_projection.weight
            tensors[f"{PEFT_PREFIX}{PROJECTION}.weight"] = own
        return tensors

    def _base_signature(self) -> list[float]:
        """`SIGNATURE_SIZE` numbers of each linear layer of the base, and of its class and token embeddings."""
        weights = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        embeddings = [self.vision_model.embeddings.class_embedding, self.text_model.embeddings.token_embedding.weight]
        samples = []
        for weight in [*embeddings, *weights]:
            values = weight.detach().flatten()
            samples.append(values[:: max(1, len(values) // SIGNATURE_SIZE)][:SIGNATURE_SIZE].float().cpu())
        return [float(f"{value:.6g}") for value in torch.cat(samples)]

    def _read_adapter(self, name: str, config_file: str, weights_file: str) -> dict[str, torch.Tensor]:
        """Read one PEFT folder and check that it fits the adapter `name` of this model."""
        try:
            peft_config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise OSError(f"{config_file} is damaged ({error}); download or save it again.") from error
        try:
            with safe_open(weights_file, framework="pt") as file:
                signature = json.loads((file.metadata() or {}).get(SIGNATURE, "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise OSError(f"{weights_file} is damaged ({error}); download or save it again.") from error
        self._check_base(weights_file, peft_config.get("base_model_name_or_path"), signature)
        for key, ours in (("r", self.config.lora_rank), ("lora_alpha", self.config.lora_alpha)):
            if peft_config.get(key) != ours:
                field = "lora_rank" if key == "r" else key
                raise ValueError(
                    f"Adapter '{name}' of {config_file} has {key}={peft_config.get(key)}, this model {field}={ours}; "
                    f"build the model with `{field}={peft_config.get(key)}`."
                )
        for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
            if peft_config.get(key):
                raise ValueError(
                    f"Adapter '{name}' of {config_file} has {key}={peft_config[key]}; this model knows only LoRA with "
                    "one rank and one alpha for all layers. Merge the adapter into its CLIP with PEFT instead."
                )
        if not self._has_adapter(name):
            if not self._changes_base(tensors):
                return {}
            remedy = "`text_lora=True`" if name == TEXT_ADAPTER else f"'{name}' in `trainable_modalities`"
            raise ValueError(
                f"Adapter '{name}' of {weights_file} was trained, but this model has none of that name; build the "
                f"model with {remedy}."
            )
        expected = self._peft_tensors(name)
        missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        if PROJECTION not in (peft_config.get("modules_to_save") or []):
            missing.discard(f"{PEFT_PREFIX}{PROJECTION}.weight")  # the adapter kept CLIP's own projection
        if missing or unexpected:
            raise ValueError(
                f"Adapter '{name}' of {weights_file} does not fit this model's `lora_targets` "
                f"{self.config.lora_targets}: missing {_some(missing)}, unexpected {_some(unexpected)}."
            )
        for key, tensor in tensors.items():
            if tensor.shape != expected[key].shape:
                raise ValueError(
                    f"{key} of {weights_file} has shape {tuple(tensor.shape)}, this model "
                    f"{tuple(expected[key].shape)}: the adapter belongs to another base model."
                )
        return tensors

    def is_base(self, modality: str) -> bool:
        """Whether a branch is the pretrained CLIP: it has no adapter, or an untrained one."""
        return modality not in self.config.trainable_modalities or not self._changes_base(self._peft_tensors(modality))

    def _changes_base(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether an adapter is more than what `save_adapters` writes for a branch without one, at any precision."""
        base = self.visual_projection.weight.cpu().float()
        projection = tensors.get(f"{PEFT_PREFIX}{PROJECTION}.weight", base).cpu().float()
        if projection.shape != base.shape or not torch.allclose(projection, base, rtol=0.01, atol=1e-3):
            return True
        return any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_B.weight"))

    def check_resumable(self, checkpoint: str | os.PathLike) -> None:
        """
        Check that a training checkpoint is one of this very model: its base, its adapters and their scale.

        Raises:
            ValueError: it is not; loading its weights would go wrong in silence.
        """
        theirs = GmailConfig.from_pretrained(checkpoint)
        for field in ("lora_rank", "lora_alpha", "lora_targets", "modalities", "trainable_modalities", "text_lora"):
            if getattr(theirs, field) != getattr(self.config, field):
                raise ValueError(
                    f"'{checkpoint}' was trained with {field}={getattr(theirs, field)}, this model has "
                    f"{getattr(self.config, field)}: resume with the settings it was started with."
                )
        weights_file = Path(checkpoint, self.config.modalities[0], "adapter_model.safetensors")
        with safe_open(weights_file, framework="pt") as file:
            signature = json.loads((file.metadata() or {}).get(SIGNATURE, "null"))
        self._check_base(str(weights_file), theirs.base_model_name_or_path, signature)

    def _check_base(self, source: str, name: str | None, signature: list[float] | None) -> None:
        ours = self.config.base_model_name_or_path
        if signature is not None:
            theirs, mine = torch.tensor(signature), torch.tensor(self._base_signature())
            same = len(theirs) == len(mine) and (theirs - mine).norm() <= SIGNATURE_TOLERANCE * mine.norm()
        else:
            same = name is None or ours is None or name == ours
        if not same:
            revision = self.config.base_model_revision
            at = f" at revision {revision}" if revision else ""
            raise ValueError(f"{source} adapts '{name}', but this model's base is '{ours}'{at} with other weights.")


def plain_vision_config(config: GmailVisionConfig) -> dict[str, Any]:
    """The fields of a `CLIPVisionConfig`, without the adapters'."""
    drop = [*ADAPTER_FIELDS, "model_type", "architectures", "transformers_version"]
    return {key: value for key, value in config.to_dict().items() if key not in drop}


@torch.no_grad()
def merged_linears(model: nn.Module, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
    """The weights of linear layers that have one of `adapters`, by their names in `model`, with its update added."""
    weights = {}
    for name, linear in _lora_linears(model):
        adapter = next((key for key in adapters if key in linear.adapters), None)
        if adapter is not None:
            lora = linear.adapters[adapter]
            update = lora.lora_B.float() @ lora.lora_A.float() * linear.scaling
            weights[f"{name}.weight"] = (linear.weight.float() + update).to(linear.weight.dtype)
    return weights


def _lora_linears(model: nn.Module) -> Iterator[tuple[str, ModalityLoRALinear]]:
    for name, module in model.named_modules():
        if isinstance(module, ModalityLoRALinear):
            yield name, module


def check_nothing_missing(source: str | os.PathLike, missing: set[str]) -> None:
    """transformers fills missing weights at random with a warning; here they are an error."""
    if missing:
        adapters_only = all(".adapters." in key or ".branches." in key for key in missing)
        remedy = (
            "If it is a plain CLIP, put fresh adapters on it with `GmailCLIPModel.from_clip`."
            if adapters_only
            else "The files are incomplete: download or save them again."
        )
        raise ValueError(f"'{source}' lacks {_some(missing)}. {remedy}")


def _some(keys: Any, limit: int = 3) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "") or "none"
