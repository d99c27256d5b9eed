"""What the recipes of the bundled checkpoints share: the optimisation loop, resumable state and half-size weights."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    """Steps of a run, peak and warm-up steps of [`learning_rate`], steps between two saved states."""

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
    Train a model in place. A run that was interrupted resumes from its last saved state.

    Args:
        accelerator, model, optimizer: not prepared yet.
        loss_of: from the model and the number of a step to that step's loss, a scalar.
        schedule: of the run.
        state_folder: where the state is kept.
        ema_decay: keep a moving average of the weights with this decay.

    Returns:
        The model, or the moving average of it.
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


def adamw(model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices alone, not biases and scales; [`fit`] sets the learning rate."""
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
    """Writes what a resumed run needs.

    No random state is kept: the recipes derive a step's scenes and the denoiser's noise from the step's number. Only
    the autoencoder's sampling noise differs after a resumption.
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
