"""A small model of each architecture with its inputs; shared by the tests of the branches."""

import torch
import transformers as t

from gmail_hf import attach_branches
from gmail_hf.branches.tower import is_adapter_weight

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 16, "projection_size": 32}
GRID = torch.tensor([[1, 8, 8], [1, 4, 12], [1, 8, 4], [1, 6, 6]])  # packed images of four sizes


def clip():
    text = {**TEXT, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98}
    return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=IMAGES, projection_dim=24))


def metaclip_2():
    text = {**TEXT, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 1}
    return t.MetaClip2Model(t.MetaClip2Config(text_config=text, vision_config=IMAGES, projection_dim=24))


def siglip():
    return t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=IMAGES))


def siglip2():
    vision = {**SIZES, "num_patches": 16, "patch_size": 8}
    return t.Siglip2Model(t.Siglip2Config(text_config=TEXT, vision_config=vision))


def dinov2():
    return t.Dinov2Model(t.Dinov2Config(**IMAGES))


def dinov2_with_registers():
    return t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**IMAGES, num_register_tokens=2))


def dinov3():  # without the random rescaling of positions in training
    return t.DINOv3ViTModel(t.DINOv3ViTConfig(**IMAGES, num_register_tokens=2, pos_embed_rescale=None))


def vit():
    return t.ViTModel(t.ViTConfig(**IMAGES), add_pooling_layer=False)


def qwen2_5_vl():
    text = {**SIZES, "num_key_value_heads": 2, "vocab_size": 99}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16}
    return t.Qwen2_5_VLModel(t.Qwen2_5_VLConfig(text_config=text, vision_config=vision)).visual


def image_inputs(name: str, rows: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """The images of some of four rows, as the tower's `forward` takes them."""
    generator = torch.Generator().manual_seed(seed)
    if name == "qwen2_5_vl":
        patches = [torch.randn(int(grid.prod()), 3 * 2 * 4 * 4, generator=generator) for grid in GRID]
        return {"hidden_states": torch.cat([patches[row] for row in rows]), "grid_thw": GRID[rows]}
    if name == "siglip2":
        patches = torch.randn(4, 16, 3 * 8 * 8, generator=generator)
        shapes = torch.tensor([[4, 4], [2, 8], [3, 4], [2, 2]])
        mask = (torch.arange(16) < shapes.prod(-1, keepdim=True)).int()
        return {"pixel_values": patches[rows], "pixel_attention_mask": mask[rows], "spatial_shapes": shapes[rows]}
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)[rows]}


@torch.no_grad()
def make(name: str, seed: int = 0):
    """A model of random weights; biases are zero and norms one at first, which would hide that they were mixed up."""
    torch.manual_seed(seed)
    model = globals()[name]().eval()
    for weight, parameter in model.named_parameters():
        if not weight.startswith("logit"):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


TOWERS = [
    *("clip", "metaclip_2", "siglip", "siglip2", "dinov2", "dinov2_with_registers", "dinov3", "vit"),
    "qwen2_5_vl",
]
NAMES = ["real", "gen", "gen", "real"]
EVERY = [0, 1, 2, 3]


def tower_of(model):
    return getattr(model, "vision_model", model)


def pooled(tower, name, rows=EVERY, **kwargs):
    inputs = image_inputs(name, rows)
    outputs = tower(**inputs, **kwargs)
    features = outputs.pooler_output
    return outputs.last_hidden_state[:, 0] if features is None else features


@torch.no_grad()
def randomise(tower, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tower.named_parameters():
        if is_adapter_weight(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def attached(name: str):
    """A tower whose branches have random weights."""
    owner = make(name)
    attach_branches(owner)
    randomise(tower_of(owner))
    return tower_of(owner)
