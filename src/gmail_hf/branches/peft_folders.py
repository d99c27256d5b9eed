"""
Branches as PEFT folders: how they are written, and how they are checked before they are loaded.

The functions take a model with branches. `model.config` has the [`AdapterFields`] and `base_model_name_or_path`.
`model.head_name` is the name of the module that computes the pooled embedding.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from ..files import replacing
from .configuration import TEXT_ADAPTER
from .routing import BranchedLinear, BranchedModule, RoutedLinear
from .tower import is_adapter_weight

PEFT_PREFIX = "base_model.model."
# A few values of each weight of the base, stored with each adapter, detect a different base at any precision.
SIGNATURE = "gmail_base_signature"
SIGNATURE_SIZE = 4
# Rounding to bfloat16 changes weights by at most 0.002 of their size; fine-tuning changes them more.
SIGNATURE_TOLERANCE = 0.003
SIGNATURE_ATOL = 1e-6

logger = logging.get_logger(__name__)


def routed_linears(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, RoutedLinear]]:
    """Linear layers with LoRA by name; with `adapter`, only those of its encoder."""
    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):
            if name.endswith(".base_layer"):
                raise ValueError(
                    f"PEFT wraps {name.removesuffix('.base_layer')}, which has branches. Restrict `target_modules` to "
                    "the language model."
                )
            of_text = TEXT_ADAPTER in module.adapters
            if adapter is None or of_text == (adapter == TEXT_ADAPTER):
                yield name, module


def head_tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The weights of a branch's head by their names in the base; the base's head for a branch without an adapter."""
    head = model.get_submodule(model.head_name) if model.head_name else None
    if adapter == TEXT_ADAPTER or not isinstance(head, (BranchedLinear, BranchedModule)):
        return {}
    if adapter not in head.branches:
        own = {name: weight for name, weight in head.named_parameters() if not is_adapter_weight(name)}
    elif isinstance(head, BranchedLinear):
        own = {"weight": head.branches[adapter]}
    else:
        own = dict(head.branches[adapter].named_parameters())
    return {f"{model.head_name}.{name}": weight for name, weight in own.items()}


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """An adapter's weights by PEFT's names; zeros and the base's head for a branch without an adapter."""
    tensors = {}
    for name, linear in routed_linears(model, adapter):
        if adapter in linear.adapters:
            lora_A, lora_B = linear.adapters[adapter].lora_A, linear.adapters[adapter].lora_B
        else:
            lora_A = linear.weight.new_zeros(linear.rank, linear.in_features)
            lora_B = linear.weight.new_zeros(linear.out_features, linear.rank)
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = lora_A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = lora_B
    return tensors | {f"{PEFT_PREFIX}{name}": weight for name, weight in head_tensors(model, adapter).items()}


def merged_state_dict(model: nn.Module, adapters: list[str]) -> dict[str, torch.Tensor]:
    """The weights of the base with merged adapters, by the base's names."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter_weight(name)}
    for adapter in adapters:
        for name, linear in routed_linears(model, adapter):
            if adapter in linear.adapters:
                weights[f"{name}.weight"] = linear.merged_weight(adapter)
        for name, tensor in head_tensors(model, adapter).items():
            weights[name] = tensor.detach().to(weights[name].dtype)
    if any(".base_layer." in name for name in weights):
        raise ValueError("PEFT wraps layers of this model. Merge its adapter first, with `merge_and_unload()`.")
    return weights


def write_peft_folder(
    model: nn.Module, adapter: str, folder: str | os.PathLike, signature: str, prefix: str | None = None
) -> None:
    """
    Write one adapter as a PEFT folder, which `PeftModel.from_pretrained(base, folder)` loads.

    Args:
        model: the model, or the tower of the model that the folder is for.
        adapter: the name of a branch, or `"text"`.
        folder: the folder, which is created if needed.
        signature: the signature of the base, see [`base_signature`].
        prefix: prefix of all names. It defaults to the tower's `outer_prefix`, its name in the other model with a dot.
    """
    from peft import LoraConfig

    folder, config = Path(folder), model.config
    prefix = getattr(model, "outer_prefix", "") if prefix is None else prefix
    folder.mkdir(parents=True, exist_ok=True)
    # One pattern per kind of layer, which matches all layer numbers.
    names = [prefix + name for name, _ in routed_linears(model, adapter)]
    kinds = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names}
    LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="|".join(sorted(kinds)),
        modules_to_save=[model.head_name] if head_tensors(model, adapter) else None,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.base_model_revision,
        inference_mode=True,
    ).save_pretrained(folder)
    weights = {
        f"{PEFT_PREFIX}{prefix}{key.removeprefix(PEFT_PREFIX)}": tensor.detach().contiguous()
        for key, tensor in adapter_tensors(model, adapter).items()
    }
    with replacing(folder / "adapter_model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt", SIGNATURE: signature})


def base_signature(model: nn.Module) -> dict[str, list[float]]:
    """`SIGNATURE_SIZE` values of every weight of the base, by name."""
    return {
        name: _sample(weight)
        for name, weight in model.named_parameters()
        if not is_adapter_weight(name) and weight.is_floating_point()
    }


def _sample(weight: torch.Tensor) -> list[float]:
    values = weight.detach().flatten()
    values = values[:: max(1, len(values) // SIGNATURE_SIZE)][:SIGNATURE_SIZE].float().cpu()
    return [float(f"{value:.6g}") for value in values]


def _old_signature(model: nn.Module) -> list[float]:
    """The signature of folders saved before version 0.1: values of CLIP's embeddings and linear layers in one list."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    embeddings = [model.vision_model.embeddings.class_embedding]
    if hasattr(model, "text_model"):
        embeddings.append(model.text_model.embeddings.token_embedding.weight)
    return [value for weight in [*embeddings, *weights] for value in _sample(weight)]


def check_base(model: nn.Module, source: str, name: str | None, signature: Any) -> None:
    """
    Check that adapters were trained on this model's base.

    Args:
        source: the adapters' name in the error message.
        name: the name of the base in the adapters' configuration.
        signature: the result of [`base_signature`] when the adapters were saved; None if they have no signature.

    Raises:
        ValueError: the adapters were trained on other weights.
    """
    ours = getattr(model.config, "base_model_name_or_path", None)
    if isinstance(signature, dict):
        mine = base_signature(model)  # a subset of theirs if the model is only the tower
        if inner := _outer_prefix(mine, signature):  # the adapters were saved from only the tower
            mine = {key: mine[inner + key] for key in signature}
        prefix = _outer_prefix(signature, mine)
        same = all(prefix + key in signature and _close(signature[prefix + key], mine[key]) for key in mine)
    elif signature is not None:
        theirs, mine = torch.tensor(signature), torch.tensor(_old_signature(model))
        if not hasattr(model, "text_model"):  # only the tower, which has the first values
            theirs, mine = theirs[:SIGNATURE_SIZE], mine[:SIGNATURE_SIZE]
        same = len(theirs) == len(mine) and (theirs - mine).norm() <= SIGNATURE_TOLERANCE * mine.norm()
    else:
        logger.warning(f"{source} has no signature, so it cannot be checked that its base is '{ours}'.")
        same = name is None or ours is None or name == ours
    if not same:
        revision = getattr(model.config, "base_model_revision", None)
        at = f" at revision {revision}" if revision else ""
        raise ValueError(
            f"{source} was trained on '{name}', but this model's base is '{ours}'{at} with other weights."
        )


def _close(theirs: list[float], mine: list[float]) -> bool:
    theirs, mine = torch.tensor(theirs), torch.tensor(mine)
    return theirs.shape == mine.shape and bool(
        (theirs - mine).norm() <= SIGNATURE_TOLERANCE * mine.norm() + SIGNATURE_ATOL
    )


def read_signature(weights_file: str | os.PathLike) -> Any:
    """
    Read the base's signature from a PEFT folder's weights; None if there is none.

    Raises:
        ValueError: the signature does not consist of lists of numbers.
    """
    with safe_open(weights_file, framework="pt") as file:
        text = (file.metadata() or {}).get(SIGNATURE, "null")
    signature = parse_untrusted_json(text, f"The signature in {weights_file}")
    lists = signature.values() if isinstance(signature, dict) else [] if signature is None else [signature]
    for values in lists:
        if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
            raise ValueError(f"The signature in {weights_file} does not consist of lists of numbers.")
    return signature


def read_untrusted_json(file: str | os.PathLike) -> Any:
    """Like [`parse_untrusted_json`], but from a file."""
    return parse_untrusted_json(Path(file).read_text(encoding="utf-8"), str(file))


def parse_untrusted_json(text: str, where: str) -> Any:
    """
    Parse JSON from an untrusted source.

    Raises:
        ValueError: it is not JSON, or nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}). Download or save it again.") from None


def read_adapter(model: nn.Module, adapter: str, config_file: str, weights_file: str) -> dict[str, torch.Tensor]:
    """
    Read one PEFT folder and check that it fits this model. The model does not change.

    Args:
        model: the model.
        adapter: the name of the branch, or `"text"`.
        config_file, weights_file: the folder's two files.

    Returns:
        The weights by PEFT's names; empty if the branch has no adapter in the folder nor in this model.

    Raises:
        OSError: a file is damaged.
        ValueError: the adapter has another base, rank, scale or method; it has integer or non-finite weights; keys are
            missing or unexpected; it was trained, but this model has no adapter of that name.
    """
    try:
        peft_config = read_untrusted_json(config_file)
    except ValueError as error:
        raise OSError(str(error)) from error
    try:
        signature = read_signature(weights_file)
        with safe_open(weights_file, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise OSError(f"{weights_file} is damaged ({error}). Download or save it again.") from error
    check_base(model, weights_file, peft_config.get("base_model_name_or_path"), signature)
    _check_settings(model, adapter, config_file, peft_config)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{key} of {weights_file} holds {tensor.dtype} or values that are not finite.")
    if not has_adapter(model, adapter):
        if not changes_base(model, tensors):
            return {}
        remedy = "`text_lora=True`" if adapter == TEXT_ADAPTER else f"'{adapter}' in `trainable_modalities`"
        raise ValueError(
            f"Adapter '{adapter}' of {weights_file} was trained, but this model has no adapter of that name. Create "
            f"the model with {remedy}."
        )
    expected = adapter_tensors(model, adapter)
    names = [key.removeprefix(PEFT_PREFIX) for key in expected]
    if prefix := _outer_prefix([key.removeprefix(PEFT_PREFIX) for key in tensors], names):
        # Saved from a model that contains this tower. The heads of that model do not belong to the tower.
        tensors = {key: tensors[PEFT_PREFIX + prefix + key.removeprefix(PEFT_PREFIX)] for key in expected}
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if not peft_config.get("modules_to_save"):  # the adapter uses the base's head
        missing -= {f"{PEFT_PREFIX}{name}" for name in head_tensors(model, adapter)}
    if missing or unexpected:
        raise ValueError(
            f"Adapter '{adapter}' of {weights_file} does not fit this model's `lora_targets` "
            f"{model.config.lora_targets}: missing {some(missing)}, unexpected {some(unexpected)}."
        )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key} of {weights_file} has shape {tuple(tensor.shape)}, but this model expects "
                f"{tuple(expected[key].shape)}: the adapter belongs to another base model."
            )
    return tensors


def outer_prefix(weights_file: str | os.PathLike) -> str:
    """The tower's name, with a dot, in the model that a PEFT folder is for; "" if the tower is that model."""
    with safe_open(weights_file, framework="pt") as file:
        layers = sorted(key.removesuffix(".lora_A.weight") for key in file.keys() if key.endswith(".lora_A.weight"))
    name = layers[0].removeprefix(PEFT_PREFIX)
    signed = [key.removesuffix(".weight") for key in read_signature(weights_file) or ()]  # by their names in the tower
    own = max((key for key in signed if f".{name}".endswith(f".{key}")), key=len, default=name)
    return name.removesuffix(own)


def _outer_prefix(names: Iterable[str], ours: Iterable[str]) -> str:
    """The prefix of `ours` in names saved from a model that contains this one; "" if they are the same."""
    ours = list(ours)
    found = {name.removesuffix(ours[0]) for name in names if name.endswith(ours[0])} if ours else set()
    names = set(names)
    return next((prefix for prefix in sorted(found) if names.issuperset(prefix + name for name in ours)), "")


def _check_settings(model: nn.Module, adapter: str, config_file: str, peft_config: dict[str, Any]) -> None:
    for key, field in (("r", "lora_rank"), ("lora_alpha", "lora_alpha")):
        if peft_config.get(key) != getattr(model.config, field):
            raise ValueError(
                f"Adapter '{adapter}' of {config_file} has {key}={peft_config.get(key)}, but this model has "
                f"{field}={getattr(model.config, field)}. Create the model with `{field}={peft_config.get(key)}`."
            )
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if peft_config.get(key):
            raise ValueError(
                f"Adapter '{adapter}' of {config_file} has {key}={peft_config[key]}, but only LoRA with one rank and "
                "one alpha for all layers is supported. Merge the adapter into its base with PEFT instead."
            )
    # These initialisations change the base's weights before training.
    initialisation = peft_config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and re.match(r"pissa|olora|corda|loftq|eva", initialisation.lower()):
        raise ValueError(
            f"Adapter '{adapter}' of {config_file} has init_lora_weights='{initialisation}', which changes the base. "
            "Convert it to LoRA with PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )


@torch.no_grad()
def write_adapter(model: nn.Module, adapter: str, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the result of [`read_adapter`] into the model's adapter. If it lacks a head, the base's head is copied."""
    base = dict(model.named_parameters())
    for key, parameter in adapter_tensors(model, adapter).items():
        parameter.copy_(tensors[key] if key in tensors else base[key.removeprefix(PEFT_PREFIX)])


def has_adapter(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter has weights in this model."""
    if adapter == TEXT_ADAPTER:
        return bool(getattr(model.config, "text_lora", False))
    return adapter in model.config.trainable_modalities


def changes_base(model: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether an adapter differs, at any precision, from the one written for a branch without an adapter."""
    if any(tensor.any() for key, tensor in tensors.items() if key.endswith("lora_B.weight")):
        return True
    for name, base in model.named_parameters():
        head = tensors.get(f"{PEFT_PREFIX}{name}")
        if head is None:
            continue
        head, base = head.cpu().float(), base.cpu().float()
        if head.shape != base.shape or not torch.allclose(head, base, rtol=0.01, atol=1e-3):
            return True
    return False


def some(keys: Any, limit: int = 3) -> str:
    """The first few keys, for error messages."""
    keys = sorted(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "") or "none"
