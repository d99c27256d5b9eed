"""A branch as a LoRA adapter for vLLM, under the names of vLLM's modules."""

import json
import os

from transformers import PreTrainedModel

from ..branches.peft_folders import base_signature, write_peft_folder
from ..models.attached import attached_tower

# Models whose vision tower takes LoRA in vLLM 0.33, of those whose names were compared.
SERVED = ("llava", "llava_next", "gemma3", "paligemma", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl")
# In vLLM these towers keep their layers in a module `vision_model`, as in transformers 4.
NESTED = ("clip_vision_model", "siglip_vision_model")


def save_for_vllm(model: PreTrainedModel, save_directory: str | os.PathLike, modality: str = "gen") -> None:
    """
    Write one branch as a LoRA adapter that vLLM serves next to the plain model, with `--enable-lora
    --enable-tower-connector-lora --lora-modules gen=FOLDER`.

    For LLaVA, Gemma 3 and PaliGemma the names differ from those of [`save_branches`], whose folders PEFT and gmail-hf
    load: vLLM would accept such a folder and ignore its weights.

    Args:
        model (`PreTrainedModel`): a vision-language model whose tower has branches.
        save_directory: the folder of the adapter.
        modality (`str`): a trained branch; others are the plain model.

    Raises:
        TypeError: `model` has no attached branches.
        ValueError: it is not a vision-language model that vLLM takes such an adapter for; the branch has no weights.
    """
    tower = attached_tower(model)
    if tower is model or model.config.model_type not in SERVED:
        raise ValueError(
            f"vLLM is not known to take LoRA on the vision tower of a '{model.config.model_type}', only of {SERVED}: "
            "serve the merged model, `to_base`."
        )
    trained = tower.config.trainable_modalities
    if modality not in trained:
        raise ValueError(f"'{modality}' has the plain model's weights: there is nothing to save. Choose of {trained}.")
    base = tower.config.base_config_class.model_type
    prefix = tower.outer_prefix + ("vision_model." if base in NESTED else "")
    write_peft_folder(tower, modality, save_directory, json.dumps(base_signature(tower)), prefix)
