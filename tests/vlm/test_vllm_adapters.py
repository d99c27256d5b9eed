"""The adapter folder for vLLM against what vLLM 0.33 checks, and against the modules that it then looks for.

The rules are those of vllm/lora/peft_helper.py (`PEFTHelper`), vllm/lora/utils.py (`parse_fine_tuned_lora_name`) and
vllm/lora/lora_model.py (`from_local_checkpoint`). vLLM compares only the last part of each name, and ignores weights
of modules that it does not have; so whole names are compared here, with those that vllm/model_executor/models gives
the linear layers of a tower, after `hf_to_vllm_mapper`.
"""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from vlms import VLMS

from gmail_hf import attach_branches
from gmail_hf.branches.tower import is_adapter_weight
from gmail_hf.models.attached import attached_tower
from gmail_hf.vlm import save_for_vllm

RANK = 4
# vllm/model_executor/models: clip.py, siglip.py, idefics2_vision_model.py; `qkv_proj` is packed of three adapters.
QKV = {f"self_attn.{name}_proj": (32, 32) for name in ("q", "k", "v", "out")}
VIT = {**QKV, "mlp.fc1": (32, 48), "mlp.fc2": (48, 32)}  # inputs and outputs
QWEN = {"attn.qkv": (32, 96), "attn.proj": (32, 32)}
# By model: prefixes that its mapper replaces; a layer's name in vLLM; its linear layers; where its connector is.
HF = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}
HF |= {"model.multi_modal_projector.": "multi_modal_projector.", "lm_head.": "language_model.lm_head."}
NESTED = (HF, "vision_tower.vision_model.encoder.layers", VIT, "multi_modal_projector")
VISUAL = {"model.language_model.": "language_model.model.", "model.visual.": "visual."}
VISUAL |= {"lm_head.": "language_model.lm_head."}
GATED = {"mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32)}  # gate and up are packed
PLAIN = {"mlp.linear_fc1": (32, 48), "mlp.linear_fc2": (48, 32)}
MODELS = {
    "llava": NESTED,
    "llava_next": NESTED,
    "gemma3": NESTED,
    "paligemma": NESTED,
    "smolvlm": ({}, "model.vision_model.encoder.layers", VIT, "model.connector"),
    "qwen2_5_vl": (VISUAL | {"model.": "language_model.model."}, "visual.blocks", QWEN | GATED, "visual.merger."),
    "qwen3_vl": (VISUAL, "visual.blocks", QWEN | PLAIN, "visual.merger"),
}


def make(name):
    torch.manual_seed(0)
    model = VLMS[name].build().eval()
    attach_branches(model, rank=RANK)
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            if is_adapter_weight(weight):
                parameter.normal_()
    return model


def mapped(name, prefixes):
    """`WeightsMapper`: each prefix in turn, on what the one before it made."""
    for prefix, new in prefixes.items():
        if name.startswith(prefix):
            name = name.replace(prefix, new, 1)
    return name


@pytest.mark.parametrize("name", MODELS)
def test_vllm_finds_every_weight(name, tmp_path):
    model = make(name)
    save_for_vllm(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # PEFTHelper: what is needed, and what is refused.
    assert config["r"] == RANK <= 16 and config["lora_alpha"] == 8 and config["target_modules"]
    assert config["bias"] == "none" and config["init_lora_weights"] is True and not config["modules_to_save"]
    for feature in ("use_dora", "use_rslora", "lora_bias", "layer_replication", "rank_pattern", "alpha_pattern"):
        assert not config.get(feature)
    assert not any(config.get(key) for key in ("alora_invocation_tokens", "use_bdlora", "use_qalora"))
    prefixes, layers, linears, connector = MODELS[name]
    found = {}
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        module, matrix = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        module = mapped(module, prefixes)
        assert not module.startswith(connector)
        found[module, matrix] = tuple(tensor.shape)
    expected = {}
    for number in range(2):
        for linear, (inputs, outputs) in linears.items():
            expected[f"{layers}.{number}.{linear}", "A"] = (RANK, inputs)
            expected[f"{layers}.{number}.{linear}", "B"] = (outputs, RANK)
    assert found == expected


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_5_vl", "qwen3_vl"])
def test_the_folder_is_that_of_peft_where_the_names_agree(name, tmp_path):
    model = make(name)
    save_for_vllm(model, tmp_path)
    plain = VLMS[name].build().eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not is_adapter_weight(key)})
    merged = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    expected = model.to_base("gen").state_dict()
    for key, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, expected[key])


def test_what_vllm_does_not_serve_is_refused(tmp_path):
    for name in ("llava_onevision", "internvl", "gemma4"):
        with pytest.raises(ValueError, match=f"vision tower of a '{name}', only of .* Serve the merged model"):
            save_for_vllm(make(name), tmp_path)
    model = make("llava")
    with pytest.raises(ValueError, match=r"'real' has the plain model's weights.* Use \['gen'\]"):
        save_for_vllm(model, tmp_path, "real")
    with pytest.raises(ValueError, match="vision tower of a"):
        save_for_vllm(attached_tower(model), tmp_path)
    with pytest.raises(TypeError, match="has 0"):
        save_for_vllm(VLMS["llava"].build(), tmp_path)
    assert not any(tmp_path.iterdir())
