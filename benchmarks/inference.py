"""Image embeddings by a two-branch CLIP beside those by transformers' own CLIPModel."""

from collections.abc import Callable, Iterator
from typing import Any

import subjects
from measuring import Settings, row, take_turns, timed

AIMS = {
    "real branch": "<= 1.02",
    "gen branch, merged": "<= 1.02",
    "gen branch, unmerged": "<= 1.1",
    "a mixed batch": "<= 1.12",
}


def infer(settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds of `get_image_features` without gradients."""
    # More rounds than elsewhere: the ratios are near 1.
    shapes = settings.choose({"vit-b-32": 4}, {"vit-b-32": 16, "vit-l-14": 4}, {"vit-b-32": 512, "vit-l-14": 256})
    rounds = settings.choose(3, 9, 15)
    for size, batch in shapes.items():
        if settings.size in (None, size):
            sides = branches(settings, size, batch)
            for call in sides.values():
                call()
            seconds = take_turns(sides, rounds)
            theirs = seconds.pop("CLIPModel")
            for name, ours in seconds.items():
                yield row(
                    "infer", name, "transformers CLIPModel", "s", ours, theirs, AIMS[name], f"{size}, batch {batch}"
                )


def branches(settings: Settings, size: str, batch: int) -> dict[str, Callable[[], float]]:
    """A call for each side that embeds the batch and returns its seconds."""
    import torch

    dtype = getattr(torch, settings.dtype)
    model = subjects.gmail(size, settings)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model = model.to(dtype)
    merged = subjects.compile_layers(model.to_clip("gen").eval(), settings)
    clip = subjects.clip(size, settings).to(dtype)
    images = subjects.pixels(batch, settings).to(dtype)
    mixed = ["real", "gen"] * (batch // 2)

    @torch.inference_mode()
    def seconds(embedder: Any, **kwargs: Any) -> float:
        return timed(lambda: embedder.get_image_features(images, **kwargs), settings)

    return {
        "CLIPModel": lambda: seconds(clip),
        "real branch": lambda: seconds(model, modality="real"),
        "gen branch, merged": lambda: seconds(merged),
        "gen branch, unmerged": lambda: seconds(model, modality="gen"),
        "a mixed batch": lambda: seconds(model, modality=mixed),
    }
