"""A CLIP tokenizer whose vocabulary is built for the captions of the digits scenes."""

import json

from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

from gmail_hf.digits.scenes import COLOR_NAMES, DIGIT_NAMES

MAX_LENGTH = 16  # a caption has 9 tokens: seven words, start and end


def build_tokenizer() -> CLIPTokenizer:
    """Train a byte-level BPE on the captions, so that every word of a caption is one token.

    The vocabulary has all bytes, inside and at the end of a word, so any text can be tokenised. As in CLIP, the two
    special tokens come last, and the end token is also the padding token.
    """
    blank = CLIPTokenizer()  # CLIP's normaliser and pre-tokeniser around an empty vocabulary
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,  # never reached: training stops when every word is one token
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    phrases = [f"a {color} {digit} and" for color in COLOR_NAMES for digit in DIGIT_NAMES]
    blank.backend_tokenizer.train_from_iterator(phrases, trainer)
    merges = [tuple(merge) for merge in json.loads(blank.backend_tokenizer.to_str())["model"]["merges"]]
    endings = [symbol + "</w>" for symbol in alphabet]
    words = [left + right for left, right in merges]
    vocabulary = [*alphabet, *endings, *words, blank.bos_token, blank.eos_token]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges, model_max_length=MAX_LENGTH
    )
