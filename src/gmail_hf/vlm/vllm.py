"""A branch as a LoRA adapter for vLLM, with the names of vLLM's modules."""

import json
import os

from transformers import PreTrainedModel

from ..branches.peft_folders import base_signature, write_peft_folder
from ..models.attached import attached_tower

# Models whose vision tower supports LoRA in vLLM 0.33, as far as their names were compared.
SERVED = ("llava", "llava_next", "gemma3", "paligemma", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl")
# In vLLM, the layers of these towers are in a module `vision_model`, as in transformers 4.
NESTED = ("clip_vision_model", "siglip_vision_model")


def save_for_vllm(model: PreTrainedModel, save_directory: str | os.PathLike, modality: str = "gen") -> None:
    """
    Save one branch as a LoRA adapter, which vLLM serves next to the plain model with `--enable-lora
    --enable-tower-connector-lora --lora-modules gen=FOLDER`.

    For LLaVA, Gemma 3 and PaliGemma the names differ from those of [`save_branches`], which are for PEFT and gmail-hf.
    vLLM would load a folder of [`save_branches`] without an error and ignore its weights.

    Args:
        model (`PreTrainedModel`): a vision-language model whose tower has branches.
        save_directory: the folder for the adapter.
        modality (`str`): a branch with its own weights; others equal the plain model.

    Raises:
        TypeError: `model` has no attached branches.
        ValueError: vLLM does not support this adapter for the model, or the branch has no weights.
    """
    tower = attached_tower(model)
    if tower is model or model.config.model_type not in SERVED:
        raise ValueError(
            f"vLLM is not known to support LoRA on the vision tower of a '{model.config.model_type}', only of "
            f"{SERVED}. Serve the merged model of `to_base` instead."
        )
    trained = tower.config.trainable_modalities
    if modality not in trained:
        raise ValueError(f"'{modality}' has the plain model's weights, so there is nothing to save. Use {trained}.")
    base = tower.config.base_config_class.model_type
    prefix = tower.outer_prefix + ("vision_model." if base in NESTED else "")
    write_peft_folder(tower, modality, save_directory, json.dumps(base_signature(tower)), prefix)
