"""The processor of a captioner, for images and beginnings of captions."""

from typing import Any

from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


class ClipCapProcessorKwargs(ProcessingKwargs, total=False):
    # The prefix replaces a BOS token, and the caption continues its beginning without an EOS token.
    _defaults = {"text_kwargs": {"add_special_tokens": False}}


class ClipCapProcessor(ProcessorMixin):
    """
    The processor of a ClipCap or IFCap: an image processor and the language model's tokenizer.

    `processor(images, text, return_tensors="pt")` returns `pixel_values` and, for the beginnings of captions in
    `text`, `input_ids` and `attention_mask`. If the tokenizer has no padding token, its end-of-text token is used.

    Args:
        image_processor (`BaseImageProcessor`): the image processor of the image encoder.
        tokenizer (`PreTrainedTokenizerBase`): the language model's tokenizer.

    Raises:
        ValueError: the tokenizer has no end-of-text token, which captions need.
    """

    valid_processor_kwargs = ClipCapProcessorKwargs

    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any):
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no `eos_token`, which ends captions. Set it to the model's.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(image_processor, tokenizer, **kwargs)
