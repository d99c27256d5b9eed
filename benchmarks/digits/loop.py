"""The common parts of the recipes for the bundled checkpoints: training loop, resumable state, float16 weights."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, the peak and the warm-up steps of [`learning_rate`], and the steps between saved states."""

    num_steps: int
    peak: float
    warmup_steps: int
    save_steps: int


def fit(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.nn.Module, int], torch.Tensor],
    schedule: Schedule,
    state_folder: Path,
    ema_decay: float | None = None,
) -> torch.nn.Module:
    """
    Train a model in place. An interrupted run resumes from its last saved state.

    Args:
        accelerator, model, optimizer: must not be prepared.
        loss_of: a function from the model and the step to a scalar loss.
        schedule: the schedule of the run.
        state_folder: the folder of the saved state.
        ema_decay: decay of a moving average of the weights; by default there is none.

    Returns:
        The model, or its moving average.
    """
    model, optimizer = accelerator.prepare(model, optimizer)
    modules = {"model": model}
    if ema_decay is not None:
        modules["average"] = AveragedModel(
            accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(ema_decay)
        )
    first_step = load_state(state_folder, modules, optimizer)
    model.train()
    num_steps = schedule.num_steps
    progress = tqdm(range(first_step, num_steps), initial=first_step, total=num_steps, desc=state_folder.name)
    for step in progress:
        loss = loss_of(model, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, schedule.peak, schedule.warmup_steps)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if ema_decay is not None:
            modules["average"].update_parameters(accelerator.unwrap_model(model))
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % schedule.save_steps == 0 or step + 1 == num_steps:
            save_state(state_folder, step + 1, modules, optimizer)
    return accelerator.unwrap_model(model) if ema_decay is None else modules["average"].module


def to_pixel_values(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 `(n, 32, 32, 3)` to float32 in [-1, 1], `(n, 3, 32, 32)`."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2) / 127.5 - 1


def adamw(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay only for matrices, not for biases and scales; [`fit`] sets the learning rate."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )


def learning_rate(step: int, num_steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to zero at `num_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))


def save_state(folder: Path, step: int, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Save the state of a run.

    There is no random state: the recipes derive the scenes and the denoiser's noise from the step. Only the
    autoencoder's sampling noise differs in a resumed run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
    }
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
    # Rename a complete file, so that an interruption keeps the previous state.
    partial = folder / "state.safetensors.partial"
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, partial, {"step": str(step)})
    partial.rename(folder / "state.safetensors")


def load_state(folder: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Restore the state of [`save_state`] and return its number of steps, 0 if there is no state."""
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
    """Save float16 weights with a config for float32: half the size, but loaded in full precision."""
    model.half().save_pretrained(folder)
    model.float()
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    if "dtype" in config:  # in models of transformers; those of diffusers load as float32 by default
        config["dtype"] = "float32"
        config_path.write_text(json.dumps(config, indent=2) + "\n")
