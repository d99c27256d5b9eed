"""Conversations to train and evaluate on, made from the rows of a data set, and their checks before a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image
from transformers import LlavaProcessor

from ..training.data import BadImageError, decode_image, undecoded
from .chat import IMAGE_TOKEN

Messages = list[dict[str, Any]]  # a conversation in the format of transformers' chat templates
DEFAULT_QUESTION = "Provide a one-sentence caption for the provided image."


class Conversations:
    """
    Rows for [`LlavaCollator`], made from a data set on access.

    A conversation is a row's cell of `messages_column`, if the data set has that column; otherwise the result of each
    of the functions `ask`; otherwise the row's caption as the answer to `question`.

    Args:
        rows (`datasets.Dataset`): the data set; a column `modality` names the branch of a row's images.
        image_column: column with an image or a list of images.
        name: of the data set, for errors.
        messages_column: column with conversations in the format of transformers' chat templates.
        caption_column: column with captions.
        question: the question that captions answer.
        ask: by name, functions from a row of the data set to a conversation about its one image. Each row of the data
            set becomes as many rows here, with the name as their `kind`.

    Attributes:
        kinds: the `kind` of the rows that one row of the data set becomes: `messages`, the names in `ask`, or
            `caption`.

    Raises:
        ValueError: a column is missing, or the data set is empty.
    """

    def __init__(
        self,
        rows: Dataset,
        image_column: str,
        name: str = "The data set",
        messages_column: str = "messages",
        caption_column: str = "caption",
        question: str = DEFAULT_QUESTION,
        ask: Mapping[str, Callable[[dict[str, Any]], Messages]] | None = None,
    ):
        self.ask = ask or {}
        if messages_column in rows.column_names:
            self.kinds, needed = ["messages"], [messages_column]
        elif ask:
            others = [column for column, feature in rows.features.items() if isinstance(feature, Image)]
            others += [image_column, "modality"]
            self.kinds, needed = list(ask), [column for column in rows.column_names if column not in others]
        else:
            self.kinds, needed = ["caption"], [caption_column]
        missing = [column for column in (image_column, *needed) if column not in rows.column_names]
        if missing:
            raise ValueError(f"{name} lacks the column(s) {missing}; it has {rows.column_names}.")
        if len(rows) == 0:
            raise ValueError(f"{name} is empty.")
        self.has_modality = "modality" in rows.column_names
        self.text_columns = [*needed, *(["modality"] if self.has_modality else [])]
        self.rows = undecoded(rows.select_columns([image_column, *self.text_columns]))
        self.image_column, self.name, self.question = image_column, name, question

    def __len__(self) -> int:
        return len(self.rows) * len(self.kinds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, kind = self.rows[index // len(self.kinds)], self.kinds[index % len(self.kinds)]
        if kind == "messages":
            messages = row[self.text_columns[0]]
        elif kind in self.ask:
            messages = self.ask[kind](row)
        else:
            question = [{"type": "image"}, {"type": "text", "text": self.question}]
            answer = [{"type": "text", "text": row[self.text_columns[0]]}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        images = row[self.image_column]
        if images is None:  # a conversation without images needs none
            images = [None] * count_images(messages)
        example = {"messages": messages, "images": images if isinstance(images, list) else [images], "kind": kind}
        return {**example, "modality": row["modality"]} if self.has_modality else example

    def check(self, processor: LlavaProcessor, modalities: Sequence[str], sample: int = 8) -> None:
        """
        Read all texts once, and a sample of the images, before a long run.

        Args:
            processor: the model's.
            modalities: the model's branches.
            sample: how many rows' images to read.

        Raises:
            ValueError: a text is missing or is not a conversation with an assistant's turn; it shows another number of
                images than its row has; a modality is unknown; none of the sampled images can be read.
        """
        token = processor.image_token
        if token in self.question:
            raise ValueError(f"The question contains '{token}', the placeholder of an image: leave it out.")
        texts = self.rows.select_columns(self.text_columns)
        for index, (row, images) in enumerate(zip(texts, self._image_counts(), strict=True)):
            for column in self.text_columns:
                try:
                    shown = self._check_cell(column, row[column], token, modalities)
                    if shown is not None and images is not None and shown != images:
                        raise ValueError(
                            f"it shows {shown} image(s), by items of the type image or '{token}' in a text, and the "
                            f"row has {images}; show each image once"
                        )
                except ValueError as error:
                    raise ValueError(f"{self.name}, row {index}, column '{column}': {error}.") from None
        self._check_images(sample)

    def _check_cell(self, column: str, cell: Any, token: str, modalities: Sequence[str]) -> int | None:
        """Number of images that a text shows; None for a cell that is not text."""
        if self.has_modality and column == "modality":
            if cell is not None and cell not in modalities:
                raise ValueError(f"unknown modality '{cell}'; the model's branches are {list(modalities)}")
            return None
        if self.kinds == ["messages"]:
            check_messages(cell)
            return count_images(cell, token)
        if self.kinds == ["caption"]:
            if not isinstance(cell, str):
                raise ValueError(f"it holds {type(cell).__name__}, not text; leave the row out")
            if token in cell:
                raise ValueError(f"it contains '{token}', the placeholder of an image; remove it")
        return 1

    def _image_counts(self) -> Iterator[int | None]:
        """Number of images of each row, without reading them; None where the cell is empty."""
        images = self.rows.select_columns(self.image_column).with_format("arrow")
        for batch in images.iter(1000):
            cells = batch.column(self.image_column)
            if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
                yield from pc.list_value_length(cells).to_pylist()
            else:
                yield from (1 if there else None for there in cells.is_valid().to_pylist())

    def _check_images(self, sample: int) -> None:
        failures = []
        indices = np.unique(np.linspace(0, len(self.rows) - 1, sample).astype(int))
        for index in indices:
            try:
                for image in self[int(index) * len(self.kinds)]["images"]:
                    decode_image(image)
            except BadImageError as error:
                failures.append(f"row {index}: {error}")
        if len(failures) == len(indices):
            raise ValueError(
                f"{self.name}: of {len(indices)} sampled rows none can be read in column '{self.image_column}', first "
                f"{failures[0]}."
            )


def count_images(messages: Sequence[dict[str, Any]], image_token: str = IMAGE_TOKEN) -> int:
    """Number of images that a conversation shows: items of the type `image`, and `image_token` in texts."""
    contents = [message["content"] for message in messages]
    texts = [content for content in contents if isinstance(content, str)]
    items = [item for content in contents if not isinstance(content, str) for item in content]
    texts += [item["text"] for item in items if item["type"] == "text"]
    return sum(item["type"] == "image" for item in items) + sum(text.count(image_token) for text in texts)


def check_messages(messages: Any) -> None:
    """
    Check that a cell is a conversation in the format of transformers' chat templates that can be learned.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"it holds {messages!r}, not a list of turns")
    for turn in messages:
        keys = sorted(turn) if isinstance(turn, dict) else []
        if {"from", "value"} <= set(keys):
            raise ValueError(
                "its turns have 'from' and 'value', as LLaVA's published data; with `dataset.map`, rename these to "
                "'role' and 'content', and the roles 'human' and 'gpt' to 'user' and 'assistant'"
            )
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"a turn needs 'role' and 'content', got {turn!r}")
        content = turn.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise ValueError(f"the content of a turn is text or a list of items, not {content!r}")
        for item in content:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind not in ("text", "image") or (kind == "text" and not isinstance(item.get("text"), str)):
                raise ValueError(f"an item of a turn is a text or an image, not {item!r}")
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise ValueError(f"it needs an assistant's turn that answers another one, its roles are {roles}")
