"""Convert checkpoints of SynCLR (Tian et al., 2023), vision encoders trained only on generated images."""

import os
import re

from transformers import ViTConfig, ViTImageProcessor, ViTModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.utils import logging

from .renaming import count_layers, fill, grid_size, read_tensors, require

logger = logging.get_logger(__name__)

HEAD_SIZE = 64
PREFIX = re.compile(r"^(module\.)?visual\.")
# Weights of the encoder that its embedding does not use.
UNUSED = re.compile(r"^(head\.|mask_token$)")
# From transformers' names to timm's.
RENAMES = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^layernorm", "norm"),
    (r"^layers", "blocks"),
    (r"\.layernorm_before", ".norm1"),
    (r"\.layernorm_after", ".norm2"),
    (r"\.attention\.[qkv]_proj", ".attn.qkv"),
    (r"\.attention\.o_proj", ".attn.proj"),
)


def convert_synclr(checkpoint: str | os.PathLike, output_dir: str | os.PathLike) -> None:
    """
    Convert an official SynCLR checkpoint to a folder that [`from_base`] and
    `ViTModel.from_pretrained(..., add_pooling_layer=False)` load.

    Args:
        checkpoint: the `.pth` file. Its entry `state_dict` or `model` has a ViT with timm's names and the prefix
            `visual.` or `module.visual.`. Other weights, such as projection heads, are left out, and their number is
            logged. Only tensors are read, no code. Sizes are taken from their shapes; attention heads have 64
            dimensions.
        output_dir: the folder for the model in float32 and its image processor, with the resizing and cropping of
            SynCLR's evaluation.

    Raises:
        ValueError: the file holds Python objects or another kind of encoder, or weights are missing or unknown.
    """
    everything = read_tensors(checkpoint)
    encoder = {PREFIX.sub("", name): tensor for name, tensor in everything.items() if PREFIX.match(name)}
    weights = {name: tensor for name, tensor in encoder.items() if not UNUSED.match(name)}
    require(weights, ["patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"], checkpoint)
    width, _, _, patch = weights["patch_embed.proj.weight"].shape
    size = grid_size(weights["pos_embed"][0], "pos_embed") * patch
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=count_layers(weights, "blocks."),
        num_attention_heads=width // HEAD_SIZE,
        intermediate_size=len(weights["blocks.0.mlp.fc1.weight"]),
        layer_norm_eps=1e-6,
        image_size=size,
        patch_size=patch,
    )
    model = ViTModel(config, add_pooling_layer=False)
    fill(model, weights, RENAMES, checkpoint)
    model.save_pretrained(output_dir)
    ViTImageProcessor(
        size={"shortest_edge": size},
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(output_dir)
    logger.info(f"Left out {len(everything) - len(weights)} weights of '{checkpoint}' that the encoder does not use.")
