"""The embedded default: real digits scenes, a small CLIP, diffusion generator and language model, none downloaded."""

from pathlib import Path

from .generate import generate_pairs
from .scenes import load_digits

__all__ = ["clip_path", "generate_pairs", "generator_path", "llama_path", "load_digits"]


def clip_path() -> str:
    """The folder of the base CLIP (`CLIPModel` with its `CLIPProcessor`), trained on real train scenes only."""
    return str(Path(__file__).with_name("clip"))


def generator_path() -> str:
    """The folder of the generator, a `diffusers.StableDiffusionPipeline` trained on real train scenes only."""
    return str(Path(__file__).with_name("generator"))


def llama_path() -> str:
    """The folder of the language model (`LlamaForCausalLM` with its tokenizer), trained on text only."""
    return str(Path(__file__).with_name("llama"))
