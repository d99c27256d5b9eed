"""Image embeddings of a CLIP with branches, compared with those of transformers' CLIPModel."""

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
    sizes = settings.choose({"vit-b-32": 2}, {"vit-b-32": 8, "vit-l-14": 2}, {"vit-b-32": 512, "vit-l-14": 256})
    if settings.size is not None:
        sizes = {settings.size: settings.choose(2, 8, 256)}
    for size, batch in sizes.items():
        sides = branches(settings, size, batch)
        for call in sides.values():
            call()
        # More rounds than elsewhere: the ratios are near 1.
        seconds = take_turns(sides, settings.choose(3, 7, 15))
        theirs = seconds.pop("CLIPModel")
        for name, ours in seconds.items():
            note = f"{size}, batch {batch}"
            yield row("infer", name, "transformers CLIPModel", "s", ours, theirs, AIMS[name], note)


def branches(settings: Settings, size: str, batch: int) -> dict[str, Callable[[], float]]:
    """A function per side that embeds the batch and returns the seconds."""
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
