"""The bundled data and models: real digits scenes, a small CLIP, a diffusion generator and a language model."""

from .generate import generate_pairs, load_pairs
from .paths import clip_path, generator_path, llama_path
from .scenes import load_digits

__all__ = ["clip_path", "generate_pairs", "generator_path", "llama_path", "load_digits", "load_pairs"]
