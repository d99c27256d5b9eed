"""Figures of pairs and their embeddings for TensorBoard, Weights & Biases and Trackio."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

from ..metrics import plot_embeddings, plot_pairs
from ..metrics._checks import optional_import
from .data import BadImageError, decode_image, undecoded
from .embeddings import embed_images

logger = logging.get_logger(__name__)

TRACKERS = (TensorBoardCallback, WandbCallback, TrackioCallback)
MIN_PAIRS = 10  # `plot_embeddings` refuses fewer


class FiguresCallback(TrainerCallback):
    """
    Log a figure of held-out embeddings before and after alignment ([`metrics.plot_embeddings`]) at each evaluation,
    and a contact sheet of the pairs ([`metrics.plot_pairs`]) at the first one.

    The figures are logged to TensorBoard, Weights & Biases or Trackio, as `report_to` selects. [`GmailTrainer`] adds
    this callback for `log_figures=True`.

    Args:
        callbacks: the trainer's callbacks, which include those of the trackers.
        dataset (`datasets.Dataset`): pairs with both images; the figures show the first of them.
        num_pairs (`int`): pairs in the figure of embeddings.
        num_shown (`int`): pairs on the contact sheet.

    Raises:
        TypeError: the pairs are streamed, or there are several data sets.
        ValueError: there are no evaluation pairs, an image column is missing, fewer than 10 pairs can be read, or
            `report_to` contains none of these trackers.
        ImportError: the packages of `gmail-hf[evaluation]` are missing.
    """

    def __init__(
        self, callbacks: Sequence[TrainerCallback], dataset: Dataset, num_pairs: int = 256, num_shown: int = 12
    ):
        for package in ("matplotlib", "sklearn"):
            optional_import(package)
        if dataset is None:
            raise ValueError("`log_figures` needs evaluation pairs: pass `eval_dataset`, or --eval_split.")
        if not isinstance(dataset, Dataset):
            raise TypeError(f"`log_figures` needs pairs from one `datasets.Dataset`, got {type(dataset).__name__}.")
        missing = {"real_image", "generated_image", "caption"} - set(dataset.column_names)
        if missing:
            raise ValueError(f"`log_figures` needs pairs, but the evaluation data lacks {sorted(missing)}.")
        if not any(isinstance(callback, TRACKERS) for callback in callbacks):
            raise ValueError("`log_figures` needs 'tensorboard', 'wandb' or 'trackio' in `report_to`.")
        self.callbacks = callbacks
        self.num_shown = num_shown
        self.real, self.generated, self.captions, self.image_ids = _readable(dataset, num_pairs)
        if len(self.captions) < MIN_PAIRS:
            raise ValueError(f"`log_figures` needs {MIN_PAIRS} readable pairs, got {len(self.captions)}.")
        self.shown = False

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self._log(state.global_step, args, model, processing_class)
        except Exception as error:  # drawing, disk or tracker: training continues without the figures
            logger.warning(f"The figures of the evaluation at step {state.global_step} were not logged: {error!r}.")

    def _log(self, step: int, args: Any, model: Any, processor: Any) -> None:
        images = {"eval/embeddings": self._draw_embeddings(args, model, processor)}
        if not self.shown:
            images["eval/pairs"] = self._draw_pairs()
            self.shown = True
        for callback in self.callbacks:
            log_images(callback, images, step)

    def _draw_embeddings(self, args: Any, model: Any, processor: Any) -> PILImage.Image:
        def embed(cells: list[Any], modality: str) -> np.ndarray:
            return embed_images(model, processor, cells, modality, batch_size=args.per_device_eval_batch_size)

        after = embed(self.generated, args.generated_modality)
        before = embed(self.real, "real"), embed(self.generated, "real")
        return _drawn(plot_embeddings, *before, after, image_ids=self.image_ids)

    def _draw_pairs(self) -> PILImage.Image:
        shown = slice(self.num_shown)
        real, generated = ([decode_image(cell) for cell in cells[shown]] for cells in (self.real, self.generated))
        return _drawn(plot_pairs, real, generated, self.captions[shown])


def log_images(callback: TrainerCallback, images: dict[str, PILImage.Image], step: int) -> None:
    """Send images by name to a tracker's callback; do nothing for any other callback."""
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        for name, image in images.items():
            callback.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
        callback.tb_writer.flush()
    elif isinstance(callback, WandbCallback):
        import wandb

        wandb.log({name: wandb.Image(image) for name, image in images.items()} | {"train/global_step": step})
    elif isinstance(callback, TrackioCallback):
        import trackio

        trackio.log({name: trackio.Image(image) for name, image in images.items()} | {"train/global_step": step})


def _readable(dataset: Dataset, count: int) -> tuple[list[Any], list[Any], list[str], list[Any]]:
    """Real images, generated images, captions and ids of the first `count` pairs that can be read."""
    real, generated, captions, image_ids = [], [], [], []
    for row in undecoded(dataset):
        try:
            for column in ("real_image", "generated_image"):
                decode_image(row[column])
        except BadImageError:
            continue
        real.append(row["real_image"])
        generated.append(row["generated_image"])
        captions.append(row["caption"])
        image_ids.append(row["image_id"])
        if len(captions) == count:
            break
    return real, generated, captions, image_ids


def _drawn(plot: Any, *data: Any, **options: Any) -> PILImage.Image:
    """The image drawn by a plotting function of [`metrics`]."""
    buffer = BytesIO()
    plot(buffer, *data, **options)
    return PILImage.open(buffer).convert("RGB")
