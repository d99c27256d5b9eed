"""The embedded default: real digits scenes, a small CLIP and a small diffusion generator, none of it downloaded."""

from pathlib import Path

from .generate import generate_pairs
from .scenes import load_digits

__all__ = ["clip_path", "generate_pairs", "generator_path", "load_digits"]


def clip_path() -> str:
    """The folder of the base CLIP (`CLIPModel` with its `CLIPProcessor`), trained on real train scenes only."""
    return str(Path(__file__).with_name("clip"))


def generator_path() -> str:
    """The folder of the generator, a `diffusers.StableDiffusionPipeline` trained on real train scenes only."""
    return str(Path(__file__).with_name("generator"))
