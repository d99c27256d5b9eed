"""`GmailTrainer`: the Hugging Face Trainer on pairs of generated and real images."""

import dataclasses
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..branches.configuration import TEXT_ADAPTER
from ..branches.tower import adapter_of
from ..files import write_file
from ..metrics import alignment_metrics, image_text_retrieval
from ..models.attached import attached_tower
from ..models.base import GmailModel, GmailOutput, text_options
from ..models.loading import find_detector
from ..publishing.model_cards import write_card
from ..publishing.provenance import PROVENANCE, name_pairs, provenance, weights_digest
from ..publishing.results import read_json
from .arguments import GmailTrainingArguments
from .callbacks import FiguresCallback
from .checks import check_for_training, pairs_digest
from .data import GmailCollator
from .losses import GmailLossConfig, gmail_loss
from .pairing import CaptionSampler, EpochCallback
from .preparation import EmbeddedPairs, drop_unused, replace_images
from .safe_trainer import SafeTrainer

NO_PAIR = -1  # the caption id of padding rows; other ids are not negative
# Settings that must not change when training is resumed. `recipe` only sets others.
RESUMABLE = (
    *(field.name for field in dataclasses.fields(GmailLossConfig) if field.name != "recipe"),
    *("generated_modality", "token_layer", "pairing", "images_per_caption"),
)

logger = logging.get_logger(__name__)


def compute_pair_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    The metrics of [`GmailTrainer`]: [`metrics.alignment_metrics`] of pairs of images and, if a loss uses captions,
    [`metrics.image_text_retrieval`] of real images. `predictions` holds the embeddings by name, `label_ids` the ids of
    captions and images.
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
    Train the branches of a [`GmailCLIPModel`] or of another base (Algorithm 1 of the paper, stage 1, and the text
    losses of stage 2).

    The arguments are those of `Trainer`, without `model_init`. The data sets hold pairs, see [`data`](data.py). The
    base is frozen. The image adapters train if a loss aligns images, the `text` adapter trains if a loss uses
    captions. Images of a frozen branch are embedded once, when the data set is first used.

    Args:
        model ([`GmailCLIPModel`], [`GmailSiglipModel`], [`GmailDinov2Model`], ...): the model, or any model that
            [`attach_branches`] changed, whose tower is trained and saved.
        args ([`GmailTrainingArguments`]): the settings.
        train_dataset, eval_dataset (`datasets.Dataset` or `datasets.IterableDataset`, or for evaluation a `dict` of
            them): pairs. A column `real_embeds` or `generated_embeds`, lists of `projection_dim` floats (None or NaN
            for an unreadable image), replaces the images of a frozen branch. The embeddings need not be normalised.
        processing_class (`CLIPProcessor`): the processor, or only an image processor if no loss needs captions.

    Raises:
        TypeError: `model`, `args` or a data set has the wrong class.
        ValueError: [`check_pairs`] refuses a data set; there are embeddings for a branch that trains, or together with
            `token_weight`; nothing is left to train; only text losses are used, on a branch that was never aligned;
            weights are float16 or sharded by FSDP or ZeRO-3; one process uses several GPUs; several processes evaluate
            a streamed data set.
    """

    # The loss is a mean over the pairs of a batch, so the Trainer has to average accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: GmailModel,
        args: GmailTrainingArguments,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(model, GmailModel):
            model = attached_tower(model)
        if not isinstance(args, GmailTrainingArguments):
            raise TypeError(f"GmailTrainer takes GmailTrainingArguments, got {type(args).__name__}.")
        if processing_class is None:
            raise ValueError("GmailTrainer needs `processing_class`, the model's processor.")
        if model.dtype == torch.float16:
            raise ValueError(
                "float16 weights cannot be trained: load the model with `dtype=torch.float32`, and use `bf16=True` or "
                "`fp16=True` for mixed precision."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"A single process for {args.n_gpu} GPUs (`nn.DataParallel`) would contrast each part of a batch "
                "separately. Start one process per GPU with `accelerate launch` or `torchrun`, or select one GPU with "
                "CUDA_VISIBLE_DEVICES."
            )
        _choose_trainable(model, args)
        named = {"train_dataset": train_dataset}
        named.update(eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset})
        for name, dataset in named.items():
            if dataset is not None:
                check_for_training(dataset, name, model, args)
        streamed = isinstance(train_dataset, IterableDataset)
        if args.pairing != "caption" and train_dataset is not None:
            if model.trains("real") or streamed or "generated_image" not in train_dataset.column_names:
                raise ValueError(
                    f'`pairing="{args.pairing}"` needs a frozen real branch and a data set with generated images that '
                    "is not streamed."
                )
        if args.images_per_caption > 1 and streamed:
            raise ValueError("`images_per_caption` needs random access, but train_dataset is streamed.")
        if args.needs_text and not hasattr(model, "text_model"):
            raise ValueError(f"{type(model).__name__} has no text encoder: text losses need one.")
        text = text_options(model) if args.needs_text else None
        collator = GmailCollator(processing_class, args.needs_text, args.on_bad_image, True, text)
        kwargs.setdefault("data_collator", collator)
        kwargs.setdefault("compute_metrics", compute_pair_metrics)
        # Computed from the user's data sets, because prepared ones tell less about their origin.
        self.provenance = provenance(model.config, named, args.world_size) if args.should_save else {}
        self.provenance["pairs_digest"] = pairs_digest(train_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=None if train_dataset is None else drop_unused(train_dataset, args),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(EpochCallback())
        if args.log_figures:
            self.add_callback(FiguresCallback(self.callback_handler.callbacks, eval_dataset))
        self._terms: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.skipped_pairs = 0  # in all processes and before resuming, as of the last log
        self._skipped = self._skipped_before = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # An interrupted call, or `cost`, may have left numbers.
        self._terms.clear()
        self.skipped_pairs = self._skipped = self._skipped_before = 0
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        self.train_dataset = self._prepare(self.train_dataset, self.args.pairing)
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.args.images_per_caption == 1:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        captions = (dataset.pairs if isinstance(dataset, EmbeddedPairs) else dataset)["caption"][:]
        return CaptionSampler(captions, self.args.images_per_caption, self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if eval_dataset is None:
            self.eval_dataset = self._prepare(self.eval_dataset)
        elif isinstance(eval_dataset, str):
            self.eval_dataset = {**self.eval_dataset, eval_dataset: self._prepare(self.eval_dataset[eval_dataset])}
        else:
            check_for_training(eval_dataset, "eval_dataset", self.model, self.args)
            # With persistent workers, the Trainer would return the loader of `self.eval_dataset`.
            return super().get_test_dataloader(self._prepare(eval_dataset))
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        check_for_training(test_dataset, "test_dataset", self.model, self.args)
        return super().get_test_dataloader(self._prepare(test_dataset))

    def _prepare(self, dataset: Any, pairing: str = "caption") -> Any:
        if not isinstance(dataset, (Dataset, IterableDataset)):  # prepared before
            return dataset
        barrier = self.accelerator.wait_for_everyone
        return replace_images(dataset, self.model, self.processing_class, self.args, pairing, barrier)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch, args = dict(inputs), self.args
        skipped = batch.pop("skipped_pairs", None)
        ids = {name: batch.pop(name, None) for name in ("image_ids", "caption_ids")}
        precomputed = self._precomputed(batch)
        outputs = model(
            **batch,
            generated_modality=args.generated_modality,
            mini_batch_size=args.contrastive_mini_batch_size,
            token_layer=args.token_layer if args.token_weight > 0 else None,
        )
        outputs = GmailOutput(**outputs, **precomputed)
        scale, bias = (getattr(self.model, name, None) for name in ("logit_scale", "logit_bias"))
        scale = None if scale is None else scale.exp()
        step = self.state.global_step if model.training else 0  # all evaluations use the same directions
        seed = int(np.random.SeedSequence([args.seed, step]).generate_state(1)[0])
        losses = gmail_loss(outputs, **ids, logit_scale=scale, config=args, logit_bias=bias, seed=seed)
        loss = losses.pop("loss")
        if model.training:
            self._skipped += int(skipped) if skipped is not None else 0
            for name, term in losses.items():
                self._terms[f"{name}_loss"].append(term.detach())
        return (loss, outputs) if return_outputs else loss

    def _precomputed(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Remove the embeddings that replace images from a batch, and return them L2-normalised."""
        embeds, dim = {}, self.model.embed_dim
        for side, modality in self.args.branches.items():
            values = batch.pop(f"{side}_embeds", None)
            if values is None:
                continue
            if f"{side}_pixel_values" in batch:
                raise ValueError(f"A batch must have either `{side}_pixel_values` or `{side}_embeds`, not both.")
            if self.model.trains(modality):
                raise ValueError(
                    f"`{side}_embeds` cannot replace images while the `{modality}` branch trains: "
                    f"pass `{side}_pixel_values`."
                )
            if len(values) and values.shape[1:] != (dim,):
                raise ValueError(f"`{side}_embeds` has shape {tuple(values.shape)}; the model's dimension is {dim}.")
            values = values.reshape(len(values), dim)  # a batch without readable pairs may have another `dim`
            embeds["real_embeds" if side == "real" else "gen_embeds"] = nn.functional.normalize(values, dim=-1)
        return embeds

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        # The Trainer gathers without padding, but a process that skipped a pair has one row less than the others.
        pad = self.accelerator.pad_across_processes
        embeds = {name: outputs[name].float().detach() for name in outputs if name.endswith("_embeds")}
        return loss.detach(), pad(embeds), pad((inputs["caption_ids"], inputs["image_ids"]), pad_index=NO_PAIR)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # All processes log at the same steps, so the terms can be averaged over the processes.
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[name] = self.accelerator.gather(torch.stack(values).mean()).mean().item()
                if logs[name] == 0:
                    logger.warning(
                        f"{name} was 0 in each of the last {len(values)} steps: no pair had a negative in its batch. "
                        "Use larger batches, or shuffle the pairs so that batches mix captions."
                    )
            self._terms.clear()
        if ("loss" in logs or "train_loss" in logs) and self._count_skipped():
            logs["skipped_pairs"] = self.skipped_pairs
        super().log(logs, start_time)

    def _count_skipped(self) -> int:
        skipped = self.accelerator.gather(torch.tensor(self._skipped, device=self.args.device)).sum().item()
        self.skipped_pairs = self._skipped_before + skipped
        return self.skipped_pairs

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        logged = self.skipped_pairs
        if self._count_skipped() > logged:  # a resumed run reads the number from the log
            self.log({"skipped_pairs": self.skipped_pairs})
        super()._save_checkpoint(model, trial)

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
        Write the model's card into `output_dir`, from the records of the run; see [`publishing.model_card`].

        Args:
            language, tags: metadata for the Hub.
            license: the model's license; defaults to that of its base.
            model_name: the title; defaults to the last part of the model's id.
            dataset: the Hub id of the pairs. `datasets` reports it only in lower case, and not at all for files.
            known: other arguments of transformers, such as `tasks`, which are ignored.
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
            write_file(Path(folder, PROVENANCE), f"{content}\n")
            if not Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR):  # a checkpoint's state is written last
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
        self._check_same_run(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.model.detector is None:
            self.model.detector = find_detector(self.model, resume_from_checkpoint)
        self.provenance["resumed"] = True
        log = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME)).log_history
        self._skipped_before = max((entry.get("skipped_pairs", 0) for entry in log), default=0)

    def _check_same_run(self, checkpoint: str) -> None:
        """Refuse a checkpoint of a run with another loss or other pairs. Earlier versions recorded no pairs."""
        remedy = "Resume with the original ones, or start a new run with the checkpoint as the model."
        theirs, ours = read_json(checkpoint, "training_args.json"), self.args.to_sanitized_dict()
        for name in RESUMABLE:
            if theirs.get(name, ours[name]) != ours[name]:
                raise ValueError(
                    f"'{checkpoint}' was trained with other settings: {name}={theirs[name]}, but this run has "
                    f"{ours[name]}. {remedy}"
                )
        digests = read_json(checkpoint, PROVENANCE).get("pairs_digest"), self.provenance["pairs_digest"]
        if None not in digests and digests[0] != digests[1]:
            raise ValueError(f"'{checkpoint}' was trained on other pairs. {remedy}")


def _choose_trainable(model: GmailModel, args: GmailTrainingArguments) -> None:
    """Train only the parameters that a loss reaches: DDP fails on unused ones."""
    model.freeze_base()
    modality = args.generated_modality
    model.tower.check_modalities([modality])
    layers = getattr(model.tower.config, "num_hidden_layers", None) or model.tower.config.depth
    if args.token_weight > 0 and not -layers - 1 <= args.token_layer <= layers:
        raise ValueError(f"`token_layer` {args.token_layer} is out of range: the vision tower has {layers} layers.")
    if args.gen_text_weight > 0 and not args.aligns and modality != "real" and model.is_base(modality):
        raise ValueError(
            f"The `{modality}` branch still equals the pretrained model, so text losses would treat generated images "
            'as real ones. Align it first (stage 1), or set `generated_modality="real"` to do this on purpose.'
        )
    reached = ({modality, "real"} if args.aligns else set()) | ({TEXT_ADAPTER} if args.needs_text else set())
    for name, parameter in model.adapter_parameters():
        parameter.requires_grad_(adapter_of(name) in reached)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trained == 0:
        raise ValueError(
            "Nothing to train: text losses train only the text adapter (`text_lora=True` or `add_text_lora()`), "
            "alignment losses train the branches in `trainable_modalities`."
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    logger.info(f"Training {trained:,} of {total:,} parameters ({trained / total:.2%}).")
