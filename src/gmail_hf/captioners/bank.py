"""IFCap's caption bank: captions to retrieve, with their embeddings, their entities and the tokens of the prompt."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from transformers.utils import cached_file

from ..branches.peft_folders import read_untrusted_json
from ..files import write_file

EMBEDS_NAME, CAPTIONS_NAME = "caption_bank.safetensors", "caption_bank.json"
MAX_PROMPT_LENGTH = 32  # tokens
CHUNK = 65_536  # captions scored at once


class CaptionBank:
    """
    Distinct captions to retrieve. Create a bank with [`~CaptionBank.build`].

    Args:
        captions (list of `str`): distinct captions.
        embeds (`torch.FloatTensor` of shape `(captions, dim)`): their L2-normalised embeddings.
        entities (list of lists of `str`): the distinct entities of each caption.
        words (dict of `str` to lists of `int`): tokens of each entity and of the prompt's fixed words.
    """

    START, SEPARATOR, END = "There are", ",", " in the image."

    def __init__(
        self,
        captions: list[str],
        embeds: torch.Tensor,
        entities: list[list[str]],
        words: dict[str, list[int]],
    ):
        self.captions, self.embeds, self.entities, self.words = captions, embeds, entities, words

    @classmethod
    def build(
        cls,
        captions: Sequence[str],
        embeds: np.ndarray,
        find_entities: Callable[[str], list[str]],
        tokenizer: Any,
        desc: str | None = None,
    ) -> "CaptionBank":
        """
        Create a bank: find the entities of captions and tokenise them.

        Args:
            captions: distinct captions.
            embeds (`np.ndarray` of shape `(captions, dim)`): their embeddings, see [`embed_texts`].
            find_entities: a function from a caption to its entities, from [`nltk_nouns`] or [`listed_words`].
            tokenizer: the language model's tokenizer.
            desc (`str`, *optional*): title of the progress bar. By default there is no bar.

        Raises:
            ValueError: captions repeat, or the number of embeddings differs from that of captions.
        """
        if len(set(captions)) != len(captions) or len(captions) != len(embeds):
            raise ValueError(
                f"Expected distinct captions with one embedding each, got {len(captions)} captions, "
                f"{len(set(captions))} of them distinct, and {len(embeds)} embeddings."
            )
        bar = tqdm(captions, desc=desc, disable=desc is None, unit="caption")
        entities = [list(dict.fromkeys(find_entities(caption))) for caption in bar]
        texts = {name: f" {name}" for found in entities for name in found}
        texts |= {text: text for text in (cls.START, cls.SEPARATOR, cls.END)}
        words = dict(zip(texts, tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"], strict=True))
        return cls(list(captions), torch.from_numpy(np.asarray(embeds, np.float32)), entities, words)

    def __len__(self) -> int:
        return len(self.captions)

    def on(self, device: torch.device) -> torch.Tensor:
        """Move the embeddings `(captions, dim)` to a device and return them."""
        self.embeds = self.embeds.to(device)
        return self.embeds

    def retrieve(
        self, queries: torch.Tensor, count: int, exclude: torch.Tensor | None = None, chunk_size: int = CHUNK
    ) -> torch.Tensor:
        """
        The nearest captions by cosine similarity.

        Args:
            queries (`torch.FloatTensor` of shape `(queries, dim)`): embeddings of images or captions, of any length.
            count (`int`): captions per query, at most all but one.
            exclude (`torch.LongTensor` of shape `(queries,)`, *optional*): for each query, a row to exclude.
            chunk_size (`int`): captions scored at once; the result does not depend on it.

        Returns:
            `torch.LongTensor` of shape `(queries, count)`, rows of the bank, the nearest first.
        """
        embeds, queries = self.on(queries.device), queries.float()
        scores, rows = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self), chunk_size):
            found = queries @ embeds[start : start + chunk_size].T  # (queries, chunk)
            numbers = torch.arange(start, start + found.shape[1], device=queries.device).expand_as(found)
            if exclude is not None:
                found = found.masked_fill(numbers == exclude[:, None], -torch.inf)
            scores, rows = torch.cat([scores, found], dim=1), torch.cat([rows, numbers], dim=1)
            scores, best = scores.topk(min(count, scores.shape[1]), dim=1)
            rows = rows.gather(1, best)
        return rows

    def frequent_entities(self, rows: Sequence[int], threshold: int) -> list[str]:
        """Entities in more than `threshold` of the captions in `rows` (IFCap's frequency-based entity filtering)."""
        counts = Counter(name for row in rows for name in self.entities[row])
        return [name for name, count in counts.items() if count > threshold]

    def prompt(self, entities: Sequence[str]) -> list[int]:
        """
        Tokens of the hard prompt "There are ENTITY, ENTITY in the image.", at most `MAX_PROMPT_LENGTH`. Without
        entities the prompt is empty.

        Entities are in alphabetical order, so that the prompt does not reveal their order in a caption. Those that do
        not fit are left out.
        """
        prompt: list[int] = []
        for name in sorted(entities):
            longer = [*prompt, *self.words[self.SEPARATOR if prompt else self.START], *self.words[name]]
            if len(longer) + len(self.words[self.END]) > MAX_PROMPT_LENGTH:
                break
            prompt = longer
        return [*prompt, *self.words[self.END]] if prompt else []

    def save(self, folder: str | os.PathLike) -> None:
        """Save the bank as `caption_bank.safetensors` and `caption_bank.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        texts = {"captions": self.captions, "entities": self.entities, "words": self.words}
        write_file(Path(folder, CAPTIONS_NAME), json.dumps(texts, ensure_ascii=False) + "\n")
        write_file(Path(folder, EMBEDS_NAME), save({"embeds": self.embeds.cpu().contiguous()}))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **hub: Any) -> "CaptionBank":
        """
        Load a bank from a folder of [`~CaptionBank.save`] or from a model on the Hub.

        Args:
            source: the folder, or a Hub id.
            hub: `revision`, `token`, `cache_dir` and other arguments for downloads.

        Raises:
            OSError: a file is missing.
            ValueError: the files are damaged, or do not belong together.
        """
        texts = read_untrusted_json(cached_file(source, CAPTIONS_NAME, **hub))
        tensors = load_file(cached_file(source, EMBEDS_NAME, **hub))
        try:
            bank = cls(texts["captions"], tensors["embeds"], texts["entities"], texts["words"])
            needed = {cls.START, cls.SEPARATOR, cls.END, *(name for row in bank.entities for name in row)}
            whole = len(bank) == len(bank.entities) == len(bank.embeds) and needed <= set(bank.words)
        except (KeyError, TypeError):
            whole = False
        if not whole or bank.embeds.ndim != 2 or not bank.embeds.isfinite().all():
            raise ValueError(
                f"{CAPTIONS_NAME} and {EMBEDS_NAME} of '{source}' are damaged or do not belong together: save or "
                "download them again."
            )
        return bank
