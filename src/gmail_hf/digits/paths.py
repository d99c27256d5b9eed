"""Paths of the bundled checkpoints."""

from pathlib import Path


def clip_path() -> str:
    """Folder of the base CLIP (`CLIPModel` with its `CLIPProcessor`), trained only on real train scenes."""
    return str(Path(__file__).with_name("clip"))


def generator_path() -> str:
    """Folder of the generator, a `diffusers.StableDiffusionPipeline` trained only on real train scenes."""
    return str(Path(__file__).with_name("generator"))


def llama_path() -> str:
    """Folder of the language model (`LlamaForCausalLM` with its tokenizer), trained only on text."""
    return str(Path(__file__).with_name("llama"))
