"""Conversations for training and evaluation, created from the rows of a data set, and their checks before a run."""

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
    Rows for [`LlavaCollator`], created from a data set on access.

    A conversation is the row's `messages_column` if the data set has that column, otherwise the result of each
    function in `ask` if given, otherwise the row's caption as the answer to `question`.

    Args:
        rows (`datasets.Dataset`): the data set. An optional column `modality` has the branch of a row's images.
        image_column: column with an image or a list of images.
        name: the data set's name in error messages.
        messages_column: column with conversations in the format of transformers' chat templates.
        caption_column: column with captions.
        question: the question that captions answer.
        ask: functions by name, each from a row of the data set to a conversation about its image. Each row of the data
            set gives one row per function, with the function's name as its `kind`.

    Attributes:
        kinds: the `kind` of each row that a row of the data set gives: `messages`, the names in `ask`, or `caption`.

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
        if images is None:  # fine for a conversation without images; a missing image counts as unreadable
            images = [None] * count_images(messages)
        example = {"messages": messages, "images": images if isinstance(images, list) else [images], "kind": kind}
        return {**example, "modality": row["modality"]} if self.has_modality else example

    def check(self, processor: LlavaProcessor, modalities: Sequence[str], sample: int = 8) -> None:
        """
        Check all texts and a sample of the images before a long run.

        Args:
            processor: the model's processor.
            modalities: the model's branches.
            sample: the number of rows whose images are read.

        Raises:
            ValueError: a text is missing or is not a conversation with an assistant's turn; the number of images in a
                conversation differs from that of its row; a modality is unknown; none of the sampled images can be
                read.
        """
        token = processor.image_token
        if token in self.question:
            raise ValueError(f"The question contains '{token}', the placeholder for an image: remove it.")
        texts = self.rows.select_columns(self.text_columns)
        for index, (row, images) in enumerate(zip(texts, self._image_counts(), strict=True)):
            for column in self.text_columns:
                try:
                    shown = self._check_cell(column, row[column], token, modalities)
                    if shown is not None and images is not None and shown != images:
                        raise ValueError(
                            f"it refers to {shown} image(s), by items of type image or '{token}' in a text, but the "
                            f"row has {images}; refer to each image once"
                        )
                except ValueError as error:
                    raise ValueError(f"{self.name}, row {index}, column '{column}': {error}.") from None
        self._check_images(sample)

    def _check_cell(self, column: str, cell: Any, token: str, modalities: Sequence[str]) -> int | None:
        """Number of images that a cell refers to; None for a modality."""
        if self.has_modality and column == "modality":
            if cell is not None and cell not in modalities:
                raise ValueError(f"unknown modality '{cell}'; the model's branches are {list(modalities)}")
            return None
        if self.kinds == ["messages"]:
            check_messages(cell)
            return count_images(cell, token)
        if self.kinds == ["caption"]:
            if not isinstance(cell, str):
                raise ValueError(f"it holds {type(cell).__name__}, not text; remove the row")
            if token in cell:
                raise ValueError(f"it contains '{token}', the placeholder for an image; remove it")
        return 1

    def _image_counts(self) -> Iterator[int | None]:
        """Number of images in each row, without reading them; None for an empty cell."""
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
                f"{self.name}: none of {len(indices)} sampled rows in column '{self.image_column}' can be read. The "
                f"first is {failures[0]}."
            )


def count_images(messages: Sequence[dict[str, Any]], image_token: str = IMAGE_TOKEN) -> int:
    """Number of images that a conversation refers to, by items of type `image` or by `image_token` in texts."""
    contents = [message["content"] for message in messages]
    texts = [content for content in contents if isinstance(content, str)]
    items = [item for content in contents if not isinstance(content, str) for item in content]
    texts += [item["text"] for item in items if item["type"] == "text"]
    return sum(item["type"] == "image" for item in items) + sum(text.count(image_token) for text in texts)


def text_of(message: dict[str, Any]) -> str:
    """The text of a turn, without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(item.get("text") or "" for item in content)


def check_messages(messages: Any) -> None:
    """
    Check that a cell is a conversation in the format of transformers' chat templates, with an assistant's turn.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"it holds {messages!r}, not a list of turns")
    for turn in messages:
        keys = sorted(turn) if isinstance(turn, dict) else []
        if {"from", "value"} <= set(keys):
            raise ValueError(
                "its turns have 'from' and 'value', as in LLaVA's published data; with `dataset.map`, rename these to "
                "'role' and 'content', and the roles 'human' and 'gpt' to 'user' and 'assistant'"
            )
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"a turn needs 'role' and 'content', got {turn!r}")
        content = turn.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise ValueError(f"the content of a turn must be text or a list of items, got {content!r}")
        for item in content:
            kind = item.get("type") if isinstance(item, dict) else None
            if kind not in ("text", "image") or (kind == "text" and not isinstance(item.get("text"), str)):
                raise ValueError(f"an item of a turn must be a text or an image, got {item!r}")
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise ValueError(f"it needs an assistant's turn that answers another turn, but its roles are {roles}")
