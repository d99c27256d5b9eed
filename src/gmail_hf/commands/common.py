"""Code shared by the training commands: loading pairs and models, early checks, and the training run."""

import logging
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import lock_folder, unlock_folder
from .options import option

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

ATTENTION = "Attention implementation: sdpa, eager or flash_attention_2."
PAIRS = (
    "Data set of pairs: a Hub id; a CSV, JSON, JSONL, parquet, Arrow or tar file, or a folder of them; folders of "
    "images; or digits, the bundled data, which is generated on first use."
)
DTYPES = ("float32", "bfloat16", "float16")
# Files in folders that save_to_disk or generate wrote.
LISTED = ("dataset_info.json", "dataset_dict.json", "manifest.json")
REVISION = "Revision of --model on the Hub."

logger = logging.getLogger("gmail_hf")


@dataclass
class PairArguments:
    """Options for the pairs of a command."""

    _argument_group_name = "data"

    dataset: str = option(PAIRS, "digits")
    dataset_config: str | None = option("Configuration of a data set on the Hub.")
    dataset_revision: str | None = option("Revision of --dataset on the Hub.")
    split: str = option("Split to train on.", "train")
    eval_split: str | None = option("Split to evaluate on.")
    max_train_samples: int | None = option("Train only on the first rows, up to this number.")
    max_eval_samples: int | None = option("Evaluate only on the first rows, up to this number.")
    curated: str | None = option("Train only on the rows that a mask.parquet of gmail-hf curate keeps.")
    real_image_column: str = option("Column with the real images.", "real_image")
    caption_column: str = option("Column with the captions.", "caption")

    def load(
        self,
        args: "TrainingArguments",
        columns: dict[str, str] | None = None,
        generated_column: str = "generated_image",
        messages_column: str | None = None,
    ) -> "tuple[Dataset, Dataset | None]":
        """
        Load the training and evaluation pairs, first in the main process; see [`bundled.load_pairs`].

        Args:
            args: arguments of the run.
            columns, messages_column: see [`bundled.load_pairs`].
            generated_column: column of the images to which the mask applies. For the real images of pairs, it is that
                of their generated images, which the mask describes.

        Raises:
            FileNotFoundError, ValueError: see [`bundled.load_pairs`] and [`generation.apply_mask`].
        """
        from ..generation.masks import apply_mask
        from .bundled import load_pairs

        source = {"config_name": self.dataset_config, "revision": self.dataset_revision, "columns": columns}
        source["messages_column"] = messages_column
        with args.main_process_first(desc="loading pairs"):
            train = load_pairs(self.dataset, self.split, max_samples=self.max_train_samples, **source)
            if self.curated:
                of_real = generated_column == self.real_image_column and "generated_image" in train.column_names
                column = "generated_image" if of_real else generated_column
                train = apply_mask(train, self.curated, column, self.title(self.split))
            if not self.eval_split:
                return train, None
            return train, load_pairs(self.dataset, self.eval_split, max_samples=self.max_eval_samples, **source)

    def found(self, *columns: str) -> dict[str, str]:
        """Return those of the real images' column and other columns whose usual names the loader can find."""
        from ..training.data import PAIR_COLUMNS

        return {name: name for name in (self.real_image_column, *columns) if name in PAIR_COLUMNS}

    def title(self, split: str) -> str:
        """Return the name of a split for error messages."""
        return f"Split '{split}' of '{self.dataset}'"


@dataclass
class MeasuringArguments:
    """Options of a command that embeds pairs with a model."""

    _argument_group_name = "model and data"

    model: str | None = option("Hub id or folder of a base or of a model with branches, or digits.")
    model_revision: str | None = option(REVISION)
    dataset: str = option(PAIRS, "digits")
    dataset_config: str | None = option("Configuration of a data set on the Hub.")
    dataset_revision: str | None = option("Revision of --dataset on the Hub.")
    split: str = option("Split of --dataset.", "train")
    real_image_column: str = option("Column with the real images.", "real_image")
    generated_image_column: str = option("Column with the generated images.", "generated_image")
    caption_column: str = option("Column with the captions.", "caption")
    image_id_column: str = option("Column with the ids of the real images.", "image_id")
    batch_size: int = option("Images per forward pass.", 64)
    device: str | None = option("Device. Defaults to the GPU if there is one.")

    def __post_init__(self) -> None:
        if self.model is None:
            if self.dataset != "digits":
                raise ValueError(f"Pass the model to embed the images of '{self.dataset}' with --model.")
            self.model = "digits"
        for name in ("max_samples", "batch_size"):
            if (value := getattr(self, name, None)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")

    def load_pairs(self, max_samples: int | None = None) -> "Dataset":
        """Check the device and the name of the model, then load the pairs, see [`bundled.load_pairs`]."""
        from ..publishing.provenance import local_path
        from ..training.data import PAIR_COLUMNS
        from .bundled import load_pairs, model_path

        device_of(self.device)
        local_path(model_path(self.model), "model")
        columns = {name: getattr(self, f"{name}_column") for name in PAIR_COLUMNS}
        return load_pairs(self.dataset, self.split, self.dataset_config, self.dataset_revision, columns, max_samples)

    def load_model(self, name: str, revision: str | None = None) -> tuple[Any, Any]:
        """Load a model in evaluation mode on the device, and its processor, see [`load_two_branches`]."""
        import torch

        model, processor = load_two_branches(name, revision, dtype=torch.float32)
        return model.to(device_of(self.device)).eval(), processor


def check_output_outside(output_dir: str, *sources: str | None) -> None:
    """
    Raises:
        ValueError: the output folder is one of these folders, or inside it.
    """
    folder = Path(output_dir).resolve()
    for source in sources:
        if source and Path(source).is_dir() and folder.is_relative_to(Path(source).resolve()):
            raise ValueError(
                f"The output folder '{output_dir}' is inside '{source}', which this command reads: its files would "
                "look like other data or another model. Choose a folder outside."
            )


def check_output_not_read(output_dir: str, dataset: str | None) -> None:
    """
    As [`check_output_outside`], unless the folder of the data set lists its files. Others are searched with their
    subfolders, and the output would pass for data of the next command.
    """
    if dataset and not any(Path(dataset, name).exists() for name in LISTED):
        check_output_outside(output_dir, dataset)


def hold_output_dir(args: Any) -> None:
    """
    Lock `args.output_dir` as long as `args` is in use.

    Raises:
        FileExistsError: another process is writing to the folder.
    """
    weakref.finalize(args, unlock_folder, lock_folder(args.output_dir))


def start(args: "TrainingArguments", dataset: str | None = None) -> str | None:
    """
    Set up logging and the seed, lock the output folder as long as `args` is in use, and return the checkpoint to
    resume from, if any. Only the main process logs, except warnings about unreadable images.

    Raises:
        ValueError: see [`check_output_not_read`].
        FileExistsError: another process is writing to the folder; see also [`training.resuming.check_output_dir`].
        FileNotFoundError: see [`training.resuming.check_output_dir`].
    """
    from transformers import set_seed

    from ..training.data import bad_images
    from ..training.resuming import check_output_dir

    logger.setLevel(logging.INFO if args.should_log else logging.ERROR)
    bad_images.setLevel(logging.WARNING)
    set_seed(args.seed)
    check_output_not_read(args.output_dir, dataset)
    if args.should_save:
        hold_output_dir(args)
    return check_output_dir(args.output_dir, args.resume_from_checkpoint)


def device_of(name: str | None) -> str:
    """
    The device of `--device`. By default it is the GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device '{name}' cannot be used ({reason}): leave it out for the default.") from error
    return name


def check_trained(name: str) -> None:
    """
    Check that the name of a model with branches is an existing folder or a Hub id.

    Raises:
        FileNotFoundError: it is neither. The message gives the command that trains a model.
    """
    from ..publishing.provenance import local_path

    try:
        local_path(name, "model")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Train it first with gmail-hf train.") from None


def load_two_branches(
    name: str, revision: str | None = None, adapters: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any]:
    """
    Load a model with branches and its processor.

    Args:
        name: a trained model, complete or only adapters; a base, which gets fresh branches; a vision-language model,
            or the branches of one, whose vision tower is returned without the language model; or `digits`.
        revision: revision on the Hub.
        adapters: fields of [`GmailConfig`] for fresh branches.
        options: keywords of `from_pretrained`.

    Raises:
        FileNotFoundError: `name` is neither an existing path nor a Hub id.
        OSError, ValueError: see [`GmailCLIPModel.from_pretrained`] and [`from_base`].
    """
    from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from ..models.attached import ATTACHED, attached_tower, from_branches, from_vlm
    from ..models.auto import MODELS, from_base
    from ..models.loading import load_processor
    from ..publishing.provenance import local_path
    from .bundled import model_path

    path, hub = model_path(name), {"revision": revision} if revision else {}
    local_path(path, "model")
    kind = PreTrainedConfig.get_config_dict(path, **hub)[0].get("model_type", "")
    if kind.startswith(ATTACHED):
        model = attached_tower(from_branches(path, revision, **options))
        at = model.config.base_model_revision or "main"
        return model, AutoImageProcessor.from_pretrained(model.config.base_model_name_or_path, revision=at)
    kind = AutoConfig.from_pretrained(path, **hub).model_type
    trained = {model.config_class.model_type: model for model in MODELS}
    if kind in trained:
        model = trained[kind].from_pretrained(path, **hub, **options)
    elif kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        model = attached_tower(from_vlm(path, **hub, **(adapters or {}), **options))
        return model, AutoImageProcessor.from_pretrained(path, **hub)  # Qwen-VL's processor needs torchvision
    else:
        model = from_base(path, **hub, **(adapters or {}), **options)
    return model, load_processor(path, revision)


def bytes_of_checkpoints(model: Any, args: "TrainingArguments", num_examples: int, bank: int = 0) -> int:
    """
    Estimate the size of all checkpoints that a run keeps: the model, and two float32 moments per trained weight.

    Args:
        model, args: model and arguments of the run.
        num_examples: rows per epoch.
        bank: bytes of other data in each checkpoint, such as IFCap's bank.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = model.num_parameters() * model.dtype.itemsize + 2 * trained * 4 + bank
    saves = _num_saves(args, num_examples)
    return size * (min(saves, args.save_total_limit or saves) + 1)


def _num_saves(args: "TrainingArguments", num_examples: int) -> int:
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    epoch = max(1, math.ceil(num_examples / batch))  # steps
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * epoch
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch":
        return math.ceil(steps / epoch)
    return math.ceil(steps / args.save_steps if args.save_steps >= 1 else 1 / args.save_steps)


def fit(trainer: Any, checkpoint: str | None) -> dict[str, float]:
    """
    Train, save the trainer's state in the output folder, and return the training metrics.

    Raises:
        KeyboardInterrupt: Ctrl-C. The message explains how to continue.
    """
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except KeyboardInterrupt:
        from ..training.resuming import last_checkpoint

        last = last_checkpoint(trainer.args.output_dir)
        raise KeyboardInterrupt(
            f"Run the same command with --resume_from_checkpoint true to continue from {last}."
            if last
            else "No checkpoint was saved yet (--save_steps): run the same command to start again."
        ) from None
    trainer.save_state()
    return metrics


def report(trainer: Any, split: str, metrics: dict[str, float]) -> None:
    """Log metrics and save them as `{split}_results.json` in the output folder."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
