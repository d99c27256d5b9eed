"""Training a LLaVA with the Trainer: batches of conversations, and LoRA on the language model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image as PILImage
from transformers import LlavaProcessor, Trainer, TrainingArguments
from transformers.utils import logging

from ..training.data import BadImageError, decode_image
from .processing import end_of_turn, lacks_bos

IGNORED = -100  # by the cross-entropy
KEPT_RENDERINGS = 4096  # texts of conversations

logger = logging.get_logger(__name__)


class LlavaCollator:
    """
    Turn conversations about images into the arguments of [`GmailLlavaForConditionalGeneration.forward`].

    Only the assistant's turns are labelled, including the token that ends them. If the chat template has no such
    token, the tokenizer's end-of-sequence token is added, as in LLaVA's training format.

    Args:
        processor (`LlavaProcessor`): see [`build_processor`].
        modality (`str`, *optional*): the branch for rows without `modality`.
        max_length (`int`, *optional*): the language model's `max_position_embeddings`. The first longer conversation
            logs a warning. Conversations are not truncated, because that could separate an image from its tokens.

    A call takes rows with `messages`, a conversation in the format of transformers' chat templates; `images`, the list
    of its images in order (see [`decode_image`]); and optionally `modality`, a name.

    Returns of a call:
        `input_ids`, `attention_mask`, `labels` `(rows, tokens)` int64, padded on the right; `pixel_values` `(images,
        channels, height, width)` float32; `modality`, a list of one name per image, if the rows or the collator have
        one. A row with an unreadable image is kept with a blank image and without labels, and a warning is logged.

    Raises:
        ValueError: the number of image items in a conversation differs from that of its images; there is no
            assistant's turn; the template renders the start of a conversation differently without the rest.
    """

    def __init__(self, processor: LlavaProcessor, modality: str | None = None, max_length: int | None = None):
        self.processor = processor
        self.modality = modality
        self.max_length = max_length
        self._rendered: dict[str, str] = {}
        self.end_of_turn = "" if end_of_turn(processor) is not None else processor.tokenizer.eos_token

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts, spans, images, counts, modality = [], [], [], [], []
        for row in rows:
            text, answers = self.render(row["messages"])
            try:
                images += [decode_image(image) for image in row["images"]]
            except BadImageError as error:
                logger.warning(f"Skipping a conversation: {error}.")
                images += [PILImage.new("RGB", (64, 64)) for _ in row["images"]]
                answers = []
            if text.count(self.processor.image_token) != len(row["images"]):
                raise ValueError(
                    f"A conversation has {text.count(self.processor.image_token)} image item(s) and "
                    f"{len(row['images'])} image(s): {row['messages']}."
                )
            texts.append(text)
            spans.append(answers)
            counts.append(len(row["images"]))
            modality += [row.get("modality") or self.modality] * len(row["images"])
        batch = self.processor(
            images=images or None,
            text=texts,
            padding=True,
            padding_side="right",
            add_special_tokens=lacks_bos(self.processor, texts[0]),
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        batch = dict(batch)
        length = batch["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            logger.warning(
                f"A conversation has {length} tokens, more than the {self.max_length} of the language model. Shorten "
                "long conversations. Further ones are not reported."
            )
            self.max_length = None
        offsets = batch.pop("offset_mapping")  # (rows, tokens, 2), characters in the text with expanded image tokens
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for index, (text, answers) in enumerate(zip(texts, spans, strict=True)):
            ids = batch["input_ids"][index]
            width = len(self.processor.image_token)
            patches = int((ids == self.processor.image_token_id).sum()) // max(counts[index], 1)
            for start, end in answers:
                shift = text.count(self.processor.image_token, 0, start) * (patches - 1) * width
                begins, stops = offsets[index].unbind(dim=-1)
                inside = (begins >= start + shift) & (stops <= end + shift) & (stops > begins)
                labels[index, inside] = ids[inside]
        batch["labels"] = labels.masked_fill(batch["input_ids"] == self.processor.image_token_id, IGNORED)
        if any(name is not None for name in modality):
            batch["modality"] = modality
        return batch

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, without expanding image tokens, and the spans of the assistant's turns in it."""
        text, answers, rendered = "", [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._template(messages[:index], add_generation_prompt=True)
            if not prompt.startswith(rendered):
                raise ValueError(
                    "The chat template renders the start of a conversation differently with the next turn: "
                    f"{rendered!r}, then {prompt!r}."
                )
            text += prompt[len(rendered) :]
            rendered = self._template(messages[: index + 1])
            if not rendered.startswith(prompt):
                raise ValueError(
                    f"The chat template does not continue its generation prompt: {prompt!r}, then {rendered!r}."
                )
            turn = rendered[len(prompt) :]
            answer = turn.rstrip() + self.end_of_turn
            answers.append((len(text), len(text) + len(answer)))
            text += answer if self.end_of_turn else turn
        if not answers:
            raise ValueError(f"A conversation has no assistant's turn: {messages}.")
        return text, answers

    def _template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        key = f"{messages} {kwargs}"
        if key not in self._rendered:  # questions repeat, and rendering is slow compared with a small model's step
            if len(self._rendered) == KEPT_RENDERINGS:
                self._rendered.clear()
            self._rendered[key] = self.processor.apply_chat_template(messages, tokenize=False, **kwargs)
        return self._rendered[key]


def language_model_lora(rank: int, alpha: float, dropout: float = 0.0) -> Any:
    """
    A `peft.LoraConfig` for a [`GmailLlavaForConditionalGeneration`]: LoRA on each linear layer of the language model,
    also on fused ones such as `qkv_proj` of Phi-3, none on the vision tower, and all weights of the projector trained
    and saved.

    Args:
        rank, alpha, dropout: `r`, `lora_alpha` and `lora_dropout` of the `LoraConfig`.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )


def optimizer_of(
    model: torch.nn.Module, args: TrainingArguments, projector_learning_rate: float | None = None
) -> torch.optim.Optimizer | None:
    """
    The optimizer of `args` with a separate learning rate for the projector, as in LLaVA-1.5's fine-tuning; None, for
    `Trainer`'s own, if there is no such rate.
    """
    if projector_learning_rate is None:
        return None
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    projector = [parameter for name, parameter in trained if "multi_modal_projector" in name]
    others = [parameter for name, parameter in trained if "multi_modal_projector" not in name]
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = [{"params": projector, "lr": projector_learning_rate}, {"params": others}]
    groups = [group for group in groups if group["params"]]
    return optimizer_class(groups, weight_decay=args.weight_decay, **settings)


class ModalityCollator:
    """
    Wrap a collator for vision-language models, such as TRL's, and add the `modality` of each image to a batch.

    Args:
        collator: takes rows with `images` (or `image`) and returns the arguments of the model's `forward`.
        default (`str`): the branch for rows without `modality`.

    A call takes rows whose optional `modality` is a name, or a list with one name per image.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], default: str = "gen"):
        self.collator = collator
        self.default = default

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        modality = []
        for row in rows:
            count = len(row["images"] or []) if "images" in row else int(row.get("image") is not None)
            names = row.get("modality") or self.default
            modality += [names] * count if isinstance(names, str) else names
        return {**self.collator(rows), "modality": modality}
