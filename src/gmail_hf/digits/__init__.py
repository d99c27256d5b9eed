"""The embedded default: real digits scenes, a small CLIP, diffusion generator and language model, none downloaded."""

from .generate import generate_pairs, load_pairs
from .paths import clip_path, generator_path, llama_path
from .scenes import load_digits

__all__ = ["clip_path", "generate_pairs", "generator_path", "llama_path", "load_digits", "load_pairs"]
