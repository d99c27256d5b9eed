"""Models and data of the benchmarks: CLIPs of real sizes with random weights, and pairs of smooth random images."""

import io
from typing import Any

from measuring import Settings

# Vision: width, layers, heads, patch; text: width, layers, heads; dimension of the embeddings. 224 pixels.
SIZES = {
    "vit-b-32": ((768, 12, 12, 32), (512, 12, 8), 512),
    "vit-l-14": ((1024, 24, 16, 14), (768, 12, 12), 768),
    "narrow": ((128, 4, 2, 32), (64, 1, 1), 64),
}


def clip_config(size: str, **fields: Any):
    from transformers import CLIPConfig

    (width, layers, heads, patch), (text_width, text_layers, text_heads), dim = SIZES[size]

    def tower(width: int, layers: int, heads: int) -> dict[str, int]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": dim}
        return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads}

    vision = tower(width, layers, heads) | {"image_size": 224, "patch_size": patch}
    return CLIPConfig(text_config=tower(text_width, text_layers, text_heads), vision_config=vision, projection_dim=dim)


def clip(size: str, settings: Settings):
    import torch
    from transformers import CLIPModel

    torch.manual_seed(0)
    return compile_layers(CLIPModel(clip_config(size)).to(settings.device).eval(), settings)


def gmail_config(size: str, **fields: Any):
    from gmail_hf import GmailConfig

    return GmailConfig.from_base_config(clip_config(size), **fields)


def gmail(size: str, settings: Settings, **fields: Any):
    import torch

    from gmail_hf import GmailCLIPModel

    torch.manual_seed(0)
    return compile_layers(GmailCLIPModel(gmail_config(size, **fields)).to(settings.device).eval(), settings)


def compile_layers(model: Any, settings: Settings) -> Any:
    """Compile each layer of the model's encoders if `settings.compile` is set, and return the model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if settings.compile and isinstance(module, GradientCheckpointingLayer):
            module.compile(backend="aot_eager" if settings.quick else "inductor")  # aot_eager needs no C++ compiler
    return model


def autocast(settings: Settings):
    import torch

    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bfloat16")


def pixels(count: int, settings: Settings):
    import torch

    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(settings.device)


def eight_bit_pixels(count: int, settings: Settings) -> dict[str, Any]:
    """Random pixels in the format of `GmailCollator(eight_bit=True)`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 224, 224), dtype=torch.uint8, generator=generator)
    scale = {"pixel_mean": torch.full((3,), 118.0), "pixel_std": torch.full((3,), 68.0)}
    return {name: values.to(settings.device) for name, values in ({"generated_pixel_values": pixels} | scale).items()}


def image_processor():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor()


def tokenizer():
    from transformers import CLIPTokenizer

    from gmail_hf.digits import clip_path

    return CLIPTokenizer.from_pretrained(clip_path())


def jpeg_pairs(count: int):
    """Pairs of 640x480 JPEGs with quality 90: smooth random fields with noise, about as large as photographs."""
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as PILImage

    rng = np.random.default_rng(0)

    def jpeg() -> dict[str, Any]:
        coarse = PILImage.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((640, 480), PILImage.Resampling.BICUBIC), np.float32)
        noisy = (field + rng.normal(0, 6, field.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        PILImage.fromarray(noisy).save(buffer, "JPEG", quality=90)
        return {"bytes": buffer.getvalue(), "path": None}

    features = Features(real_image=Image(), generated_image=Image(), caption=Value("string"), image_id=Value("int64"))
    rows = {name: [jpeg() for _ in range(count)] for name in ("real_image", "generated_image")}
    rows |= {"caption": [f"a field, number {number}" for number in range(count)], "image_id": list(range(count))}
    return Dataset.from_dict(rows, features=features)


def small_png() -> bytes:
    """A very small image, for data sets where only the number of images matters."""
    from PIL import Image as PILImage

    buffer = io.BytesIO()
    PILImage.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()
