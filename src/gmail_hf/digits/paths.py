"""Where the bundled checkpoints are."""

from pathlib import Path


def clip_path() -> str:
    """The folder of the base CLIP (`CLIPModel` with its `CLIPProcessor`), trained on real train scenes only."""
    return str(Path(__file__).with_name("clip"))


def generator_path() -> str:
    """The folder of the generator, a `diffusers.StableDiffusionPipeline` trained on real train scenes only."""
    return str(Path(__file__).with_name("generator"))


def llama_path() -> str:
    """The folder of the language model (`LlamaForCausalLM` with its tokenizer), trained on text only."""
    return str(Path(__file__).with_name("llama"))
