"""Convert official checkpoints of Long-CLIP (Zhang et al., ECCV 2024) to a CLIP of transformers."""

import os

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from .renaming import count_layers, fill, grid_size, read_tensors, require
from .stretching import KEPT_POSITIONS

HEAD_SIZE = 64
# Other entries in old exports of CLIP.
SETTINGS = ("input_resolution", "context_length", "vocab_size")
# From transformers' names to OpenAI's.
RENAMES = (
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^visual_projection\.weight", "visual.proj"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
    (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
    (r"\.layer_norm(\d)", r".ln_\1"),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1", ".mlp.c_fc"),
    (r"\.mlp\.fc2", ".mlp.c_proj"),
)


def convert_longclip(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, processor: str | os.PathLike | None = None
) -> None:
    """
    Convert an official Long-CLIP checkpoint, such as `longclip-L.pt`, to a folder that [`from_base`] and
    `CLIPModel.from_pretrained` load.

    Args:
        checkpoint: the `.pt` file, a state dict with OpenAI's names. Only tensors are read, no code. Sizes are taken
            from their shapes; attention heads have 64 dimensions.
        output_dir: the folder for the model in float32 and its image processor.
        processor: a folder or Hub id with CLIP's tokenizer, such as `"openai/clip-vit-large-patch14"`. It is saved
            with `model_max_length` set to the model's text positions. By default no tokenizer is saved.

    Raises:
        ValueError: the file holds Python objects, lacks weights or has unknown ones, or the tokenizer has another
            vocabulary.
    """
    weights = {name: tensor for name, tensor in read_tensors(checkpoint).items() if name not in SETTINGS}
    config = longclip_config(weights, checkpoint)
    length, eos = config.text_config.max_position_embeddings, config.text_config.eos_token_id
    tokenizer = None
    if processor is not None:
        tokenizer = AutoTokenizer.from_pretrained(processor, model_max_length=length)
        if tokenizer.eos_token_id != eos:
            raise ValueError(
                f"The tokenizer of '{processor}' ends texts with token {tokenizer.eos_token_id}, but this model with "
                f"its last token, {eos}. Pass the processor of the CLIP from which the checkpoint was made."
            )
    # The official model has two parameters, and uses a part of each.
    kept, rest = weights.pop("positional_embedding"), weights.pop("positional_embedding_res")
    weights["positional_embedding"] = torch.cat([kept[:KEPT_POSITIONS], rest[KEPT_POSITIONS:]])
    for name in ("text_projection", "visual.proj"):
        weights[name] = weights[name].T
    model = CLIPModel(config)
    fill(model, weights, RENAMES, checkpoint)
    model.save_pretrained(output_dir)
    size = config.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    (images if tokenizer is None else CLIPProcessor(images, tokenizer)).save_pretrained(output_dir)


def longclip_config(weights: dict[str, torch.Tensor], checkpoint: str | os.PathLike) -> CLIPConfig:
    """The configuration for a state dict with OpenAI's names, from the shapes of its weights."""
    fc = "transformer.resblocks.0.mlp.c_fc.weight"
    names = ["visual.conv1.weight", "visual.positional_embedding", "visual.proj", f"visual.{fc}", fc]
    names += ["token_embedding.weight", "positional_embedding", "positional_embedding_res", "text_projection"]
    require(weights, names, checkpoint)
    width, _, _, patch = weights["visual.conv1.weight"].shape
    vocabulary, text_width = weights["token_embedding.weight"].shape
    grid = grid_size(weights["visual.positional_embedding"], "visual.positional_embedding")
    vision = {"hidden_size": width, "intermediate_size": len(weights[f"visual.{fc}"]), "patch_size": patch}
    text = {"hidden_size": text_width, "intermediate_size": len(weights[fc]), "vocab_size": vocabulary}
    for part, prefix in ((vision, "visual."), (text, "")):
        part["num_hidden_layers"] = count_layers(weights, f"{prefix}transformer.resblocks.")
        part["num_attention_heads"] = part["hidden_size"] // HEAD_SIZE
        part |= {"hidden_act": "quick_gelu", "projection_dim": weights["text_projection"].shape[1]}
    text |= {"max_position_embeddings": len(weights["positional_embedding_res"]), "pad_token_id": vocabulary - 1}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}  # CLIP pools at the highest token id
    return CLIPConfig(
        text_config=text,
        vision_config={**vision, "image_size": grid * patch},
        projection_dim=text["projection_dim"],
    )
