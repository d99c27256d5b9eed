"""`GmailTrainer`: the Hugging Face Trainer on pairs of generated and real images."""

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput
from transformers.utils import logging

from ..branches.configuration import TEXT_ADAPTER
from ..metrics import alignment_metrics, image_text_retrieval
from ..models.base import GmailOutput
from ..models.clip import GmailCLIPModel
from ..publishing.model_cards import write_card
from ..publishing.provenance import PROVENANCE, name_pairs, provenance, weights_digest
from .callbacks import FiguresCallback
from .data import SIDES, GmailCollator, check_pairs, undecoded
from .embeddings import EmbeddedPairs, cached_embeds, embeds_array
from .losses import GmailLossConfig, gmail_loss
from .pairing import optimal_pairing
from .safe_trainer import SafeTrainer

NO_PAIR = -1  # the caption id of rows that only fill a batch; ids are not negative

logger = logging.get_logger(__name__)


@dataclass
class GmailTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with the paper's settings as defaults (GMAIL, section 4.1), and the losses of GMAIL.

    Changed defaults: `learning_rate=1e-4`, `weight_decay=0.01`, `per_device_train_batch_size=256`,
    `per_device_eval_batch_size` the same unless given, `max_steps=50_000` (unless `num_train_epochs` is given),
    `lr_scheduler_type="cosine_with_restarts"` with 5 cycles, `logging_steps=50`, `remove_unused_columns=False`.

    Args:
        temperature, align_weight, consistency_weight, gen_text_weight, real_text_weight, token_weight, token_layer,
            symmetric, generated_modality, gather_negatives: see [`GmailLossConfig`].
        contrastive_mini_batch_size (`int`, *optional*): contrast the whole batch at the memory of this many pairs;
            see [`GmailCLIPModel.embed_images`].
        pairing (`str`): `"caption"` keeps the data set's pairs; `"optimal"` re-pairs within each caption, see
            [`optimal_pairing`]; it needs `cache_real_embeds`.
        cache_real_embeds (`bool`): embed the images of a frozen branch once; see [`cached_embeds`]. The real branch is
            frozen by default; text losses alone freeze both.
        on_bad_image (`str`): `"skip"` or `"error"`, see [`GmailCollator`].
        log_figures (`bool`): log pictures of the evaluation pairs and their embeddings; see [`FiguresCallback`].

    Raises:
        ValueError: an option is out of range or contradicts another.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Pairs a device and step."})
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs a device in evaluation, images when embeddings are cached; as in training by default."
        },
    )
    num_train_epochs: float = field(
        default=-1, metadata={"help": "Epochs to train; -1 to train --max_steps, or 3 if that is -1 too."}
    )
    max_steps: int = field(
        default=50_000, metadata={"help": "Steps to train; -1, or --num_train_epochs, to train by epochs."}
    )
    lr_scheduler_type: str = field(default="cosine_with_restarts", metadata={"help": "The learning rate schedule."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two entries of the log."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator needs the columns."}
    )
    temperature: float = field(default=0.07, metadata={"help": "Temperature tau of the alignment loss (Eq. 1)."})
    align_weight: float = field(default=1.0, metadata={"help": "Weight of the alignment loss (Eq. 1)."})
    consistency_weight: float = field(default=0.0, metadata={"help": "Weight of 1 - cos of each pair."})
    gen_text_weight: float = field(default=0.0, metadata={"help": "Weight of the generated image-caption loss."})
    real_text_weight: float = field(default=0.0, metadata={"help": "Weight of the real image-caption loss."})
    token_weight: float = field(default=0.0, metadata={"help": "Weight of the patch tokens' alignment, for LLaVA."})
    token_layer: int = field(default=-2, metadata={"help": "The layer whose patch tokens that aligns."})
    symmetric: bool = field(default=False, metadata={"help": "Add the direction real -> generated to Eq. 1."})
    generated_modality: str = field(
        default="gen", metadata={"help": "The branch of generated images; 'real' takes them for real ones."}
    )
    gather_negatives: bool = field(default=True, metadata={"help": "Draw negatives from all processes."})
    contrastive_mini_batch_size: int | None = field(
        default=None, metadata={"help": "Contrast the whole batch at the memory of this many pairs."}
    )
    pairing: str = field(
        default="caption", metadata={"help": "'caption': the data set's pairs; 'optimal': re-paired within a caption."}
    )
    cache_real_embeds: bool = field(
        default=True, metadata={"help": "Embed the images of a frozen branch, such as `real`, once."}
    )
    on_bad_image: str = field(
        default="skip", metadata={"help": "'skip' pairs with an unreadable image, or raise an 'error'."}
    )
    log_figures: bool = field(
        default=False, metadata={"help": "Log pairs and their embeddings as pictures to --report_to."}
    )

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size is None:  # Eq. 1 is comparable over as many candidates only
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        if self.num_train_epochs >= 0 and self.max_steps == GmailTrainingArguments.max_steps:
            self.max_steps = -1
        if self.num_train_epochs < 0 and self.max_steps < 0:
            self.num_train_epochs = TrainingArguments.num_train_epochs
        if self.lr_scheduler_type == "cosine_with_restarts" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"num_cycles": 5}
        super().__post_init__()
        # Of a streamed data set the main process would hand out slices of one batch, which a skipped pair or captions
        # of another length make impossible: each process reads its own.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must stay False: the collator needs the data set's columns.")
        if self.pairing not in ("caption", "optimal"):
            raise ValueError(f"`pairing` is 'caption' or 'optimal', got '{self.pairing}'.")
        if self.pairing == "optimal" and not self.cache_real_embeds:
            raise ValueError('`pairing="optimal"` needs `cache_real_embeds=True`.')
        if self.on_bad_image not in ("skip", "error"):
            raise ValueError(f"`on_bad_image` is 'skip' or 'error', got '{self.on_bad_image}'.")
        self.loss_config()

    def loss_config(self) -> GmailLossConfig:
        """The losses these arguments ask for."""
        return GmailLossConfig(
            temperature=self.temperature,
            align_weight=self.align_weight,
            consistency_weight=self.consistency_weight,
            gen_text_weight=self.gen_text_weight,
            real_text_weight=self.real_text_weight,
            token_weight=self.token_weight,
            token_layer=self.token_layer,
            symmetric=self.symmetric,
            generated_modality=self.generated_modality,
            gather_negatives=self.gather_negatives,
            mini_batch_size=self.contrastive_mini_batch_size,
        )


def compute_pair_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    What [`GmailTrainer`] measures: of pairs of images [`metrics.alignment_metrics`], and where a loss looks at
    captions [`metrics.image_text_retrieval`] of real images. `predictions` holds the embeddings by name,
    `label_ids` the ids of captions and images.
    """
    caption_ids, image_ids = prediction.label_ids
    pairs = caption_ids != NO_PAIR
    caption_ids, image_ids = caption_ids[pairs], image_ids[pairs]
    embeds = {name: values[pairs] for name, values in prediction.predictions.items()}
    metrics = {}
    if "gen_embeds" in embeds and "real_embeds" in embeds:
        metrics |= alignment_metrics(embeds["gen_embeds"], embeds["real_embeds"], caption_ids, image_ids)
    if "text_embeds" in embeds and "real_embeds" in embeds:
        one_caption_each = len(np.unique(image_ids)) == len(image_ids)
        metrics |= image_text_retrieval(
            embeds["real_embeds"], embeds["text_embeds"], image_ids, caption_ids if one_caption_each else None
        )
    return metrics


class GmailTrainer(SafeTrainer):
    """
    Train the branches of a [`GmailCLIPModel`] (Algorithm 1 of the paper, stage 1, and the text losses of stage 2).

    Arguments as in `Trainer`; the data sets hold pairs, see [`data`](data.py). The base stays frozen: the image
    adapters train if a loss aligns images, the `text` adapter if a loss compares with captions.

    Args:
        model ([`GmailCLIPModel`]): the model.
        args ([`GmailTrainingArguments`]): the settings.
        train_dataset, eval_dataset (`datasets.Dataset` or `datasets.IterableDataset`, or for evaluation a `dict` of
            them): pairs.
        processing_class (`CLIPProcessor`): or an image processor alone if no loss needs captions.

    Raises:
        TypeError: `model`, `args` or a data set of another class.
        ValueError: a data set that [`check_pairs`] refuses; options that leave nothing to train; text losses alone
            on a branch that was never aligned; float16 weights; several GPUs in one process, weights sharded by FSDP
            or ZeRO-3, a streamed evaluation in several processes.
    """

    # The loss is a mean over the pairs of a batch: accumulated batches are averaged by the Trainer.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: GmailCLIPModel,
        args: GmailTrainingArguments,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(model, GmailCLIPModel):
            raise TypeError(f"GmailTrainer trains a GmailCLIPModel, got {type(model).__name__}; see `from_clip`.")
        if not isinstance(args, GmailTrainingArguments):
            raise TypeError(f"GmailTrainer takes GmailTrainingArguments, got {type(args).__name__}.")
        if processing_class is None:
            raise ValueError("GmailTrainer needs `processing_class`, the model's processor.")
        if model.dtype == torch.float16:
            raise ValueError(
                "float16 weights do not train: load the model with `dtype=torch.float32`, and ask for mixed precision "
                "by `bf16=True` or `fp16=True`."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process for {args.n_gpu} GPUs (`nn.DataParallel`) would contrast each part of a batch alone: "
                "start one for each, by `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        self.loss_config = args.loss_config()
        _choose_trainable(model, self.loss_config)
        named = {"train_dataset": train_dataset}
        named.update(eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset})
        for name, dataset in named.items():
            if dataset is not train_dataset:
                _check_evaluated_whole(dataset, name, args.world_size)
            if dataset is not None and not isinstance(dataset, (Dataset, IterableDataset)):
                raise TypeError(f"{name} must be a data set of the datasets library, got {type(dataset).__name__}.")
            if dataset is not None:
                check_pairs(dataset, name, args.on_bad_image, self.loss_config.columns)
        collator = GmailCollator(processing_class, self.loss_config.needs_text, args.on_bad_image, eight_bit=True)
        kwargs.setdefault("data_collator", collator)
        kwargs.setdefault("compute_metrics", compute_pair_metrics)
        # The data sets as the user gave them: what is made of them below tells less of where it comes from.
        self.provenance = provenance(model.config, named, args.world_size) if args.should_save else {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if args.log_figures:
            self.add_callback(FiguresCallback(self.callback_handler.callbacks, eval_dataset))
        self.train_dataset = self._prepare(self._drop_unused(train_dataset), args.pairing)
        if isinstance(eval_dataset, dict):
            self.eval_dataset = {name: self._prepare(dataset) for name, dataset in eval_dataset.items()}
        else:
            self.eval_dataset = self._prepare(eval_dataset)
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.skipped_pairs = 0

    def _drop_unused(self, dataset: Dataset | IterableDataset | None) -> Any:
        """Leave out the images that no loss looks at; in evaluation, metrics may."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        unused = {f"{side}_image" for side in SIDES} - set(self.loss_config.columns)
        return dataset.remove_columns([column for column in dataset.column_names or [] if column in unused])

    def _prepare(self, dataset: Dataset | IterableDataset | None, pairing: str = "caption") -> Any:
        """Replace images by their embeddings, where their branch is frozen."""
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        embeds = {}
        cache = self.args.cache_real_embeds and self.loss_config.token_weight == 0  # patch tokens are not cached
        if cache and isinstance(dataset, Dataset):
            for side, modality in zip(SIDES, ("real", self.loss_config.generated_modality), strict=True):
                if f"{side}_image" in dataset.column_names and not self.model.trains(modality):
                    embeds[side] = self._embed_column(dataset, f"{side}_image", modality)
        partners = None
        if pairing == "optimal":
            if "real" not in embeds:
                raise ValueError(
                    '`pairing="optimal"` needs a frozen real branch, a data set that is not streamed, no token loss.'
                )
            partners = self._optimal_partners(dataset, embeds["real"])
        return EmbeddedPairs(dataset, **embeds, partners=partners) if embeds else undecoded(dataset)

    def _embed_column(self, dataset: Dataset, column: str, modality: str = "real") -> Dataset:
        return cached_embeds(
            dataset,
            column,
            self.model,
            self.processing_class,
            modality,
            batch_size=self.args.per_device_eval_batch_size,
            on_bad_image=self.args.on_bad_image,
            barrier=self.accelerator.wait_for_everyone,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )

    def _optimal_partners(self, dataset: Dataset, real: Dataset) -> np.ndarray:
        generated = embeds_array(self._embed_column(dataset, "generated_image"))
        real = embeds_array(real)
        rows = np.flatnonzero(np.isfinite(generated).all(axis=1) & np.isfinite(real).all(axis=1))  # readable pairs
        all_captions = dataset["caption"][:]
        captions = [all_captions[row] for row in rows]
        partners = np.arange(len(dataset))
        partners[rows] = rows[optimal_pairing(generated[rows], real[rows], captions, seed=self.args.seed)]
        return partners

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(self._checked(eval_dataset, "eval_dataset"), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        return super().predict(self._checked(test_dataset, "test_dataset"), *args, **kwargs)

    def _checked(self, dataset: Any, name: str) -> Any:
        if not isinstance(dataset, (Dataset, IterableDataset)):
            return dataset
        _check_evaluated_whole(dataset, name, self.args.world_size)
        check_pairs(dataset, name, self.args.on_bad_image, self.loss_config.columns)
        return self._prepare(dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch, config = dict(inputs), self.loss_config
        skipped = batch.pop("skipped_pairs", None)
        ids = {name: batch.pop(name, None) for name in ("image_ids", "caption_ids")}
        precomputed = self._precomputed(batch)
        outputs = model(
            **batch,
            generated_modality=config.generated_modality,
            mini_batch_size=config.mini_batch_size,
            token_layer=config.token_layer if config.token_weight > 0 else None,
        )
        outputs = GmailOutput(**outputs, **precomputed)
        losses = gmail_loss(outputs, **ids, logit_scale=self.model.logit_scale.exp(), config=config)
        loss = losses.pop("loss")
        if model.training:
            self.skipped_pairs += int(skipped) if skipped is not None else 0
            for name, term in losses.items():
                self._terms[f"{name}_loss"].append(term.detach())
        return (loss, outputs) if return_outputs else loss

    def _precomputed(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Take the embeddings that a batch has in place of images out of it, L2-normalised."""
        embeds, dim = {}, self.model.config.projection_dim
        for side, modality in zip(SIDES, ("real", self.loss_config.generated_modality), strict=True):
            if (values := batch.pop(f"{side}_embeds", None)) is None:
                continue
            if f"{side}_pixel_values" in batch:
                raise ValueError(f"A batch has either `{side}_pixel_values` or `{side}_embeds`, this one has both.")
            if values.shape[1:] != (dim,):
                raise ValueError(f"`{side}_embeds` have shape {tuple(values.shape)}; the model's dimension is {dim}.")
            if self.model.trains(modality):
                raise ValueError(
                    f"`{side}_embeds` cannot replace images while the `{modality}` branch trains: "
                    f"use `{side}_pixel_values`."
                )
            name = "real_embeds" if side == "real" else "gen_embeds"
            embeds[name] = torch.nn.functional.normalize(values, dim=-1)
        return embeds

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        # The Trainer gathers rows as they are, but a process that skipped a pair has one row less than the others.
        pad = self.accelerator.pad_across_processes
        embeds = {name: outputs[name].float().detach() for name in outputs if name.endswith("_embeds")}
        return loss.detach(), pad(embeds), pad((inputs["caption_ids"], inputs["image_ids"]), pad_index=NO_PAIR)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Every process logs at the same steps, so the terms can be averaged over them.
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[name] = self.accelerator.gather(torch.stack(values).mean()).mean().item()
            self._terms.clear()
            skipped = self.accelerator.gather(torch.tensor(self.skipped_pairs, device=self.args.device)).sum().item()
            if skipped:
                logs["skipped_pairs"] = skipped
        super().log(logs, start_time)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        dataset: str | None = None,
        **known: Any,
    ) -> None:
        """
        Write the card of the model into `output_dir`, from what was run and measured; see [`publishing.model_card`].

        Args:
            language, tags: metadata of the Hub.
            license: of the model; by default that of its base.
            model_name: the title; by default the last part of the model's id.
            dataset: the id of the pairs, which `datasets` knows in lower case, and of files not at all.
            known: what transformers would be told besides, such as `finetuned_from` and `tasks`; the run tells it.
        """
        if not self.is_world_process_zero():
            return
        self.save_state()
        if dataset is not None:
            name_pairs(self.provenance, dataset)
        self._write_card(self.args.output_dir, language=language, license=license, tags=tags, name=model_name)

    def _write_card(self, folder: str, **fields: Any) -> None:
        if self.state.global_step > 0:
            content = json.dumps(self.provenance, indent=2, ensure_ascii=False)
            Path(folder, PROVENANCE).write_text(f"{content}\n", encoding="utf-8")
            if not Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):  # where the state comes last: all is saved
                self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        write_card(folder, getattr(self, "hub_model_id", None), self.args.hub_token, **fields)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.provenance["weights"] = weights_digest(folder)
            self._write_card(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        (model or self.model).check_resumable(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.provenance["resumed"] = True


def _check_evaluated_whole(dataset: Any, name: str, world_size: int) -> None:
    if isinstance(dataset, IterableDataset) and world_size > 1:  # processes would wait for each other for ever
        raise ValueError(f"{name} is streamed, whose parts are of unequal length: evaluate in one process.")


def _choose_trainable(model: GmailCLIPModel, losses: GmailLossConfig) -> None:
    """Let train what a loss reaches: unused parameters would stop DDP."""
    model.freeze_base()
    model.vision_model.check_modalities([losses.generated_modality])
    layers = model.config.vision_config.num_hidden_layers
    if losses.token_weight > 0 and not -layers - 1 <= losses.token_layer <= layers:
        raise ValueError(f"`token_layer` {losses.token_layer} is out of range: the vision tower has {layers} layers.")
    modality = losses.generated_modality
    if losses.gen_text_weight > 0 and not losses.aligns and modality != "real" and model.is_base(modality):
        raise ValueError(
            f"The `{modality}` branch is still the pretrained CLIP: text losses would take generated images for real "
            'ones. Align it first (stage 1), or say so by `generated_modality="real"`.'
        )
    images = {modality, "real"} if losses.aligns else set()
    reached = images | ({TEXT_ADAPTER} if losses.needs_text else set())
    for name, parameter in model.adapter_parameters():
        parameter.requires_grad_(any(adapter in name.split(".") for adapter in reached))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained == 0:
        raise ValueError(
            "Nothing to train: text losses alone train the text adapter (`text_lora=True` or `add_text_lora()`), "
            "alignment the branches in `trainable_modalities`."
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    logger.info(f"Training {trained:,} of {total:,} parameters ({trained / total:.2%}).")
