"""A CLIP of a few thousand weights, its processor and data; shared by the tests and by the scripts they start."""

import io

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from gmail_hf import GmailCLIPModel, GmailLossConfig
from gmail_hf.branches.tower import is_adapter_weight
from gmail_hf.training.losses import gmail_loss

IMAGE_SIZE = 16
CAPTIONS = ("a cat", "a dog", "two birds", "a red car")


def clip_config(**vision) -> CLIPConfig:
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPConfig(
        text_config={
            **shared,
            "vocab_size": 514,
            "max_position_embeddings": 40,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
        },
        vision_config={**shared, "image_size": IMAGE_SIZE, "patch_size": 8, **vision},
        projection_dim=24,
    )


def make_clip(seed: int = 0, **vision) -> CLIPModel:
    torch.manual_seed(seed)
    clip = CLIPModel(clip_config(**vision)).eval()
    # Biases are zero and norms one at first: tests would not notice that they were mixed up.
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return clip


@torch.no_grad()
def randomise(model: GmailCLIPModel, seed: int = 1, std: float = 0.1) -> GmailCLIPModel:
    """Give every adapter weights of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.adapter_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)
    return model


def make_model(clip_folder, **fields) -> GmailCLIPModel:
    torch.manual_seed(0)
    return randomise(GmailCLIPModel.from_clip(clip_folder, **fields))


def make_tokenizer() -> CLIPTokenizer:
    """Each letter a token: all that the captions here need."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=40)


def make_processor() -> CLIPProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return CLIPProcessor(image_processor=image_processor, tokenizer=make_tokenizer())


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    body = torch.randint(0, 500, (count, 6), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.full((count, 1), 512), body, torch.full((count, 1), 513)], dim=1)


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def png(seed: int, truncated: bool = False) -> dict:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    content = buffer.getvalue()
    return {"bytes": content[: len(content) // 2] if truncated else content, "path": None}


def make_pairs(
    count: int, seed: int = 0, bad_real: tuple[int, ...] = (), bad_generated: tuple[int, ...] = (), captions=None
) -> datasets.Dataset:
    """Pairs of noise images; the rows of `bad_*` hold half a PNG."""
    captions = captions or [f"{CAPTIONS[i % 4]} {i}" for i in range(count)]
    return datasets.Dataset.from_dict(
        {
            "real_image": [png(seed + 2 * i, i in bad_real) for i in range(count)],
            "generated_image": [png(seed + 2 * i + 1, i in bad_generated) for i in range(count)],
            "caption": captions,
            "image_id": [f"id-{i}" for i in range(count)],
        },
        features=datasets.Features(
            {
                "real_image": datasets.Image(),
                "generated_image": datasets.Image(),
                "caption": datasets.Value("string"),
                "image_id": datasets.Value("string"),
            }
        ),
    )


def pair_losses(model, batch, config=None, **options):
    """Outputs and losses of a batch of pairs, computed as `GmailTrainer` does; `model` may be wrapped by DDP."""
    config = config or GmailLossConfig()
    if config.token_weight > 0:
        options = {"token_layer": -2, **options}
    ids = {name: batch[name] for name in ("image_ids", "caption_ids") if name in batch}
    left_out = {*ids} if config.needs_text else {*ids, "input_ids"}
    outputs = model(**{name: values for name, values in batch.items() if name not in left_out}, **options)
    scale = getattr(model, "module", model).logit_scale.exp()
    return outputs, gmail_loss(outputs, **ids, logit_scale=scale, config=config)


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def base_dtypes(model):
    """The dtypes of all weights but the adapters', which are float32 whatever the base's."""
    return {parameter.dtype for name, parameter in model.named_parameters() if not is_adapter_weight(name)}
