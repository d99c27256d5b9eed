"""What goes into a captioner and comes out of it: images, the beginnings of captions, and captions."""

from typing import Any

from transformers.processing_utils import ProcessingKwargs, ProcessorMixin


class ClipCapProcessorKwargs(ProcessingKwargs, total=False):
    # The prefix takes the place where a text would begin; the caption continues where its beginning ends.
    _defaults = {"text_kwargs": {"add_special_tokens": False}}


class ClipCapProcessor(ProcessorMixin):
    """
    An image processor and the language model's tokenizer, saved next to the model; IFCap's too.

    `processor(images, text, return_tensors="pt")` gives `pixel_values` and, for the beginnings of captions in `text`,
    `input_ids` and `attention_mask`. A tokenizer without a padding token gets its end-of-text token for one.

    Args:
        image_processor (`BaseImageProcessor`): CLIP's.
        tokenizer (`PreTrainedTokenizerBase`): the language model's.

    Raises:
        ValueError: the tokenizer has no end-of-text token, with which captions end.
    """

    valid_processor_kwargs = ClipCapProcessorKwargs

    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any):
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no `eos_token`, with which captions end: set one of the model's.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(image_processor, tokenizer, **kwargs)
