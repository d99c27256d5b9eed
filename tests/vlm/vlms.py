"""A small model of each vision-language architecture, and texts with images for it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as t

IMAGE, WORDS = 98, 97  # the image token; ordinary tokens are below
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 99, "head_dim": 16, "eos_token_id": None, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
LLAMA, QWEN2 = {**TEXT, "model_type": "llama"}, {**TEXT, "model_type": "qwen2"}
GRIDS = torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 8]])


@dataclass
class Vlm:
    """`build()` makes it; `images(rows)` are inputs of those texts, `tokens[row]` their image tokens."""

    build: Callable[[], t.PreTrainedModel]
    images: Callable[[list[int]], dict[str, torch.Tensor]]
    tokens: list[int]

    def inputs(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Texts padded on the left, each with one image between its words."""
        generator = torch.Generator().manual_seed(7)
        texts = []
        for tokens in self.tokens:
            words = torch.randint(1, WORDS, (5,), generator=generator)
            texts.append(torch.cat([words[:2], torch.full((tokens,), IMAGE), words[2:]]))
        width = max(map(len, texts))
        ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in texts])
        mask = torch.stack([(torch.arange(width) >= width - len(text)).long() for text in texts])
        inputs = {"input_ids": ids[rows], "attention_mask": mask[rows], **self.images(rows)}
        if "image_grid_thw" in inputs or "image_position_ids" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
        return inputs


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def one_each(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(3, 3, 16, 16)[rows]}


def llava():
    config = t.LlavaConfig(text_config=LLAMA, vision_config=VISION, image_token_index=IMAGE)
    return t.LlavaForConditionalGeneration(config)


def llava_next():
    grid = {"image_grid_pinpoints": [[16, 32], [32, 16]], "image_seq_length": 4}
    config = t.LlavaNextConfig(text_config=LLAMA, vision_config=VISION, image_token_index=IMAGE, **grid)
    return t.LlavaNextForConditionalGeneration(config)


def llava_onevision():
    config = t.LlavaOnevisionConfig(
        text_config=QWEN2, vision_config=SIGLIP, image_token_index=IMAGE, image_grid_pinpoints=[[16, 32], [32, 16]]
    )
    return t.LlavaOnevisionForConditionalGeneration(config)


def gemma3():
    text = {**TEXT, "layer_types": ["full_attention"]}
    config = t.Gemma3Config(text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=IMAGE)
    model = t.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


def gemma4():
    text = {**TEXT, "layer_types": ["full_attention"], "global_head_dim": 16}
    text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64}
    del vision["image_size"]
    config = t.Gemma4Config(text_config=text, vision_config={**vision, "pooling_kernel_size": 2}, image_token_id=IMAGE)
    return t.Gemma4ForConditionalGeneration(config)


def paligemma():
    vision = {**SIGLIP, "projection_dim": 32}
    text = {**TEXT, "model_type": "gemma"}
    config = t.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_id=IMAGE)
    return t.PaliGemmaForConditionalGeneration(config)


def smolvlm():
    vision = {**VISION, "patch_size": 4}  # transformers 5.21 takes it for a divisor of the tokens per tile
    config = t.SmolVLMConfig(text_config=LLAMA, vision_config=vision, scale_factor=1, image_token_id=IMAGE)
    return t.SmolVLMForConditionalGeneration(config)


def internvl():
    vision = {**VISION, "image_size": [16, 16], "patch_size": [8, 8]}
    config = t.InternVLConfig(text_config=QWEN2, vision_config=vision, downsample_ratio=0.5, image_token_id=IMAGE)
    return t.InternVLForConditionalGeneration(config)


def multimodal_text() -> dict:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}  # which configurations change
    return {**TEXT, "rope_parameters": rope}


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = t.Qwen2VLConfig(
        text_config=multimodal_text(), vision_config=vision, image_token_id=IMAGE, vision_start_token_id=1
    )
    return t.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    text = multimodal_text()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=1)
    return t.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    text = multimodal_text()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = t.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=1)
    return t.Qwen3VLForConditionalGeneration(config)


def qwen3_5():
    text = {**multimodal_text(), "layer_types": ["full_attention"]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 64}
    config = t.Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=1)
    return t.Qwen3_5ForConditionalGeneration(config)


def glm4v():
    text = multimodal_text()
    del text["head_dim"]
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "image_size": 16}
    tokens = {"image_token_id": IMAGE, "image_start_token_id": 1, "image_end_token_id": 2}
    return t.Glm4vForConditionalGeneration(t.Glm4vConfig(text_config=text, vision_config=vision, **tokens))


def lfm2_vl():
    vision = {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4}
    vision |= {"vision_use_head": False}
    text = {**TEXT, "model_type": "lfm2", "layer_types": ["full_attention"]}
    del vision["image_size"], text["head_dim"]
    config = t.Lfm2VlConfig(text_config=text, vision_config=vision, projector_hidden_size=32, image_token_id=IMAGE)
    return t.Lfm2VlForConditionalGeneration(config)


def idefics2():
    perceiver = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 16, "num_key_value_heads": 2}
    text = {**TEXT, "model_type": "mistral"}
    config = t.Idefics2Config(text_config=text, vision_config=VISION, perceiver_config=perceiver, image_token_id=IMAGE)
    return t.Idefics2ForConditionalGeneration(config)


def aya_vision():
    text = {**TEXT, "model_type": "cohere2", "layer_types": ["full_attention"]}
    config = t.AyaVisionConfig(text_config=text, vision_config=SIGLIP, image_token_index=IMAGE)
    return t.AyaVisionForConditionalGeneration(config)


def cohere2_vision():
    text = {**TEXT, "model_type": "cohere2", "layer_types": ["full_attention"]}
    config = t.Cohere2VisionConfig(
        text_config=text, vision_config=SIGLIP, alignment_intermediate_size=48, image_token_id=IMAGE
    )
    return t.Cohere2VisionForConditionalGeneration(config)


def mistral3():
    vision = {**VISION, "model_type": "pixtral", "head_dim": 16, "patch_size": 4}
    text = {**TEXT, "model_type": "mistral"}
    config = t.Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return t.Mistral3ForConditionalGeneration(config)


def tiles(rows: list[int]) -> dict[str, torch.Tensor]:
    """Images of two shapes, each the whole and two tiles, as LLaVA-NeXT pads them."""
    sizes = torch.tensor([[16, 32], [32, 16], [16, 32]])
    return {"pixel_values": pixels(3, 3, 3, 16, 16)[rows], "image_sizes": sizes[rows]}


def padded_tiles(rows: list[int]) -> dict[str, torch.Tensor]:
    """Texts of one, two and one tile, as SmolVLM pads them."""
    values = pixels(3, 2, 3, 16, 16)
    values[[0, 2], 1] = 0
    return {"pixel_values": values[rows]}


def joined_tiles(rows: list[int]) -> dict[str, torch.Tensor]:
    """Images of one, two and one tile in one tensor, as InternVL takes them."""
    values = pixels(4, 3, 16, 16)
    tiles = [values[:1], values[1:3], values[3:]]
    return {"pixel_values": torch.cat([tiles[row] for row in rows])}


def packed(rows: list[int]) -> dict[str, torch.Tensor]:
    patches = pixels(int(GRIDS.prod(-1).sum()), 3 * 2 * 4 * 4).split(GRIDS.prod(-1).tolist())
    return {"pixel_values": torch.cat([patches[row] for row in rows]), "image_grid_thw": GRIDS[rows]}


def positioned(rows: list[int]) -> dict[str, torch.Tensor]:
    """Patches of images of three shapes, padded to 16, as Gemma 4 takes them."""
    positions = torch.full((3, 16, 2), -1)
    for row, (height, width) in enumerate([(4, 4), (2, 4), (4, 2)]):
        patches = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)  # (x, y)
        positions[row, : len(patches)] = patches
    return {"pixel_values": pixels(3, 16, 3 * 4 * 4)[rows], "image_position_ids": positions[rows]}


def naflex(rows: list[int]) -> dict[str, torch.Tensor]:
    """Patches of images of three shapes, padded to 16, as SigLIP 2 takes them."""
    shapes = torch.tensor([[4, 4], [2, 4], [4, 2]])
    mask = (torch.arange(16) < shapes.prod(-1, keepdim=True)).int()
    return {
        "pixel_values": pixels(3, 16, 48)[rows], "pixel_attention_mask": mask[rows], "spatial_shapes": shapes[rows]
    }  # fmt: skip


def padded(rows: list[int]) -> dict[str, torch.Tensor]:
    """Images of three sizes, padded, which Pixtral joins in one sequence of patches."""
    sizes = torch.tensor([[16, 16], [8, 16], [16, 8]])
    return {"pixel_values": pixels(3, 3, 16, 16)[rows], "image_sizes": sizes[rows]}


def one_per_text(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"pixel_values": pixels(3, 1, 3, 16, 16)[rows]}


PACKED = (GRIDS.prod(-1) // 4).tolist()
VLMS = {
    "llava": Vlm(llava, one_each, [4, 4, 4]),
    "llava_next": Vlm(llava_next, tiles, [4 + 8 + 2, 4 + 8 + 4, 4 + 8 + 2]),
    "llava_onevision": Vlm(llava_onevision, tiles, [4 + 8 + 2, 4 + 8 + 4, 4 + 8 + 2]),
    "gemma3": Vlm(gemma3, one_each, [4, 4, 4]),
    "gemma4": Vlm(gemma4, positioned, [4, 2, 2]),
    "paligemma": Vlm(paligemma, one_each, [4, 4, 4]),
    "smolvlm": Vlm(smolvlm, padded_tiles, [16, 32, 16]),
    "internvl": Vlm(internvl, joined_tiles, [1, 2, 1]),
    "qwen2_5_vl": Vlm(qwen2_5_vl, packed, PACKED),
    "qwen3_vl": Vlm(qwen3_vl, packed, PACKED),
    "qwen2_vl": Vlm(qwen2_vl, packed, PACKED),
    "qwen3_5": Vlm(qwen3_5, packed, PACKED),
    "glm4v": Vlm(glm4v, packed, PACKED),
    "lfm2_vl": Vlm(lfm2_vl, naflex, [4, 2, 2]),
    "idefics2": Vlm(idefics2, one_per_text, [2, 2, 2]),
    "aya_vision": Vlm(aya_vision, one_each, [1, 1, 1]),
    "cohere2_vision": Vlm(cohere2_vision, one_each, [1, 1, 1]),
    "mistral3": Vlm(mistral3, padded, [4, 2, 2]),
}
