"""
Ideas for a faster step of stage 1, each compared with the bare step of `training.py` in one run.

Some change results by rounding (bfloat16), some change the method (LoRA only in the upper layers), so they are not
defaults. `digits_alignment.py` measures the quality of LoRA only in the upper layers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import subjects
import trainers
from measuring import Settings, row, take_turns, timed

UPPER = 4  # layers with LoRA


def ideas(settings: Settings) -> Iterator[dict[str, Any]]:
    """The speed of a step with each idea, compared with a step without it."""
    import dataclasses

    size = settings.size or settings.choose("narrow", "vit-b-32", "vit-l-14")
    batch = settings.batch or settings.choose(2, 16, 64)
    half = dataclasses.replace(settings, dtype="bfloat16")
    compiled = dataclasses.replace(settings, compile=True)
    sides = {
        "as it is": step(settings, size, batch),
        "channels_last": step(settings, size, batch, channels_last),
        "eager attention": step(settings, size, batch, lambda model: model.set_attn_implementation("eager")),
        "one product for the updates of q, k and v": step(settings, size, batch, join_updates),
        "layers compiled": step(compiled, size, batch),
        f"LoRA in the upper {UPPER} layers": step(settings, size, batch, freeze_lower),
        "the same on cached hidden states below them": upper_step(settings, size, batch),
    }
    if settings.dtype == "float32":
        sides["bfloat16"] = step(half, size, batch)
        sides["bfloat16, eager attention"] = step(
            half, size, batch, lambda model: model.set_attn_implementation("eager")
        )
    for advance in sides.values():
        advance()  # compiles and allocates memory
    speeds = take_turns(
        {name: lambda advance=advance: batch / timed(advance, settings) for name, advance in sides.items()},
        settings.choose(1, 5, 5),
    )
    plain = speeds.pop("as it is")
    for name, ours in speeds.items():
        yield row("ideas", name, "a step as it is", "pairs/s", ours, plain, note=f"{size}, batch {batch}")


def step(
    settings: Settings, size: str, batch: int, change: Callable[[Any], Any] = lambda model: None
) -> Callable[[], None]:
    model = subjects.gmail(size, settings, lora_rank=trainers.RANK, lora_alpha=trainers.ALPHA).train()
    change(model)
    return trainers.bare_step(settings, model, batch)


def channels_last(model: Any) -> None:
    import torch

    model.to(memory_format=torch.channels_last)
    model.vision_model.embeddings.register_forward_pre_hook(
        lambda module, args: (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
    )


def freeze_lower(model: Any) -> None:
    model.vision_model.encoder.layers[:-UPPER].requires_grad_(False)


def join_updates(model: Any) -> None:
    """Compute the products of q, k and v with their lora_A as one product with the concatenated matrices."""
    import torch
    from torch.nn.functional import linear

    def with_low_rank(projection: Any, lows: dict[str, Any], index: int) -> Callable:
        def forward(hidden_states: torch.Tensor) -> torch.Tensor:
            low = lows["states"].split(projection.rank, dim=-1)[index] * projection.scaling
            update = linear(low, projection.adapters["gen"].lora_B)
            return linear(hidden_states, projection.weight, projection.bias) + update

        return forward

    def share(attention: Any, projections: list[Any], lows: dict[str, Any]) -> None:
        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            weights = torch.cat([projection.adapters["gen"].lora_A for projection in projections])
            lows["states"] = linear(kwargs["hidden_states"], weights)

        attention.register_forward_pre_hook(before, with_kwargs=True)

    for layer in model.vision_model.encoder.layers[:-1]:  # the last layer has fewer queries than keys
        attention, lows = layer.self_attn, {}
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        share(attention, projections, lows)
        for index, projection in enumerate(projections):
            projection.forward = with_low_rank(projection, lows, index)


def upper_step(settings: Settings, size: str, batch: int) -> Callable[[], None]:
    """A step that begins with hidden states of the frozen layers, kept in memory as if they came from a cache."""
    import torch
    from torch.nn.functional import normalize

    from gmail_hf import alignment_loss
    from gmail_hf.branches.routing import routed
    from gmail_hf.models.clip import class_token

    model = subjects.gmail(size, settings, lora_rank=trainers.RANK, lora_alpha=trainers.ALPHA).train()
    freeze_lower(model)
    vision = model.vision_model
    with torch.no_grad():
        states = vision(subjects.pixels(batch, settings), output_hidden_states=True).hidden_states[-1 - UPPER]
    partners = normalize(torch.randn(batch, model.projection_dim, device=settings.device), dim=-1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)

    def embed() -> torch.Tensor:
        hidden = states
        *layers, last = vision.encoder.layers[-UPPER:]
        for layer in layers:
            hidden = layer(hidden, None)
        return model.visual_projection(vision.post_layernorm(class_token(last, hidden)[:, 0]))

    def advance() -> None:
        with subjects.autocast(settings):
            features = routed("gen", embed)
        alignment_loss(normalize(features.float(), dim=-1), partners).backward()
        optimizer.step()
        optimizer.zero_grad()

    return advance
