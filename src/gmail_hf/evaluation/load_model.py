"""Loads and checks the models to evaluate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..branches.configuration import AUTO
from ..models.attached import ATTACHED, from_branches
from ..models.auto import MODELS
from ..models.base import GmailModel
from ..models.loading import check_checkpoint, check_finite, check_nothing_missing, load_processor
from ..models.vision_language import BranchedVLM
from ..publishing.hub import resolve_commit
from ..publishing.provenance import local_path
from .answering import has_branches
from .sources import fingerprint

BASES = tuple(model.base_class for model in MODELS)


@dataclass(frozen=True)
class LoadedModel:
    """
    A model with its processor.

    Args:
        model: the model in evaluation mode, on its device.
        processor: its processor.
        name (`str`): Hub id or folder.
        revision (`str`): commit on the Hub, or for a folder a hash of its files' names, sizes and times.
    """

    model: Any
    processor: Any
    name: str
    revision: str

    @property
    def embeds(self) -> bool:
        """Whether the model embeds images. Otherwise it is an image-text-to-text model."""
        return isinstance(self.model, (GmailModel, *BASES))

    @property
    def reads_text(self) -> bool:
        """Whether the model also embeds texts."""
        return hasattr(self.model, "get_text_features")

    def check_modality(self, modality: str) -> None:
        """
        Raises:
            ValueError: the model lacks this branch, or a detector for `"auto"`. A model without branches only has
                `real`.
        """
        if isinstance(self.model, GmailModel):
            branches = self.model.config.modalities + [AUTO] * (self.model.detector is not None)
        elif isinstance(self.model, BranchedVLM):
            branches = self.model.tower.adapter_fields.modalities
        else:
            branches = self.model.config.vision_config.modalities if has_branches(self.model) else ["real"]
        if modality not in branches:
            raise ValueError(f"'{self.name}' has no branch '{modality}'; it has {branches}.")


def load_model(
    name: str, revision: str | None = None, dtype: str = "float32", device: str | torch.device = "cpu"
) -> LoadedModel:
    """
    Load a model with branches, a plain base, or any image-text-to-text model such as ClipCap or LLaVA.

    Args:
        name: Hub id or folder. Branches of [`save_branches`] are loaded with their vision-language model.
        revision: revision on the Hub.
        dtype: dtype of the weights, a name in torch.
        device: device of the model.

    Raises:
        FileNotFoundError: `name` is a path that does not exist.
        ValueError: the model has another type, or lacks weights.
    """
    if local_path(name, "model"):
        check_checkpoint(name)
        commit, version = fingerprint(name), None
    else:  # load all files from one commit, the name of their folder in the cache
        commit = version = Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    values, _ = PreTrainedConfig.get_config_dict(name, revision=version)
    if str(values.get("model_type")).startswith(ATTACHED):
        model = from_branches(name, version, dtype=getattr(torch, dtype)).eval().to(device)
        origin = model.tower.config
        processor = AutoProcessor.from_pretrained(
            origin.base_model_name_or_path, revision=origin.base_model_revision or "main"
        )
        return LoadedModel(model, processor, name, commit)
    config = AutoConfig.from_pretrained(name, revision=version)
    if type(config) in {cls for model in MODELS for cls in (model.config_class, model.base_class.config_class)}:
        kind = AutoModel
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = AutoModelForImageTextToText
    else:
        known = sorted(model.base_class.config_class.model_type for model in MODELS)
        raise ValueError(
            f"'{name}' has the model type '{config.model_type}', which cannot be evaluated. Choose one of {known}, "
            "with or without branches, or an image-text-to-text model such as ClipCap or LLaVA."
        )
    options = {"revision": version, "dtype": getattr(torch, dtype), "output_loading_info": True}
    if not config.model_type.startswith("gmail"):  # GMAIL models only load safetensors
        options["use_safetensors"] = True
        if version is not None:  # the safetensors may be in another commit
            commit = version = options["revision"] = resolve_commit(name, {"revision": revision or "main"})
        for known in MODELS:
            if type(config) is known.base_class.config_class:
                options |= known.base_kwargs
    model, info = kind.from_pretrained(name, **options)
    check_nothing_missing(name, info["missing_keys"])
    check_finite(model, name)
    processor = load_processor(name, version)
    return LoadedModel(model.eval().to(device), processor, name, commit)
