"""What the two recipes share: the learning-rate schedule, resumable state and half-size weights."""

import json
import math
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel


def learning_rate(step: int, num_steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to zero at `num_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))


def save_state(folder: Path, step: int, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Writes what a resumed run needs to go on.

    No random state is kept: the recipes derive a step's scenes and the denoiser's noise from the step's number. Only
    the autoencoder's sampling noise is another after a resumption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
    # One file, renamed into place: an interruption leaves the previous state whole.
    partial = folder / "state.safetensors.partial"
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, partial, {"step": str(step)})
    partial.rename(folder / "state.safetensors")


def load_state(folder: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Restores what [`save_state`] wrote and returns the number of steps done, 0 if nothing was written."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict(
            {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        )
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def save_half(model: PreTrainedModel | ModelMixin, folder: Path) -> None:
    """Saves float16 weights under a config that says float32: half the size, loaded at full precision."""
    model.half().save_pretrained(folder)
    model.float()
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    if "dtype" in config:  # transformers' models; those of diffusers load as float32 unless asked otherwise
        config["dtype"] = "float32"
        config_path.write_text(json.dumps(config, indent=2) + "\n")
