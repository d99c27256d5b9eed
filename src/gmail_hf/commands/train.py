"""
Train the branches of a model on pairs of generated and real images, or the text encoder of a CLIP on generated images.

The first command trains on the bundled digits in minutes, without a download (pip install "gmail-hf[digits]"). The
second one trains on COCO with the paper's settings on 8 GPUs, with 32 pairs per GPU; coco.yaml is in examples/configs
of the repository:

    gmail-hf train
    accelerate launch --multi_gpu --num_processes 8 -m gmail_hf.commands.train \\
        --config coco.yaml --dataset org/coco-sd2 --output_dir gmail-coco

--stage selects what is trained. It sets defaults for the loss weights, which can also be set individually:

    align   the gen branch, with Eq. 1 (the default)
    text    a LoRA adapter on the text encoder, with an image-text contrastive loss on f_g(generated images). Both
            branches are frozen. Photographs then use the real branch with the trained text encoder. Training needs
            no real images.
    joint   both: Eq. 1 and the image-text contrastive loss

--fit_detector also fits a detector of generated images on the pairs, for images of unknown origin (modality "auto").
Options in the YAML file of --config are overridden by options on the command line. Without --config and --dataset, the
default is --config digits. All other defaults are the paper's, except that its batch of 256 applies per device. To
continue an interrupted run, add --resume_from_checkpoint true.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .cli import run
from .common import (
    ATTENTION,
    REVISION,
    PairArguments,
    bytes_of_checkpoints,
    fit,
    load_two_branches,
    logger,
    report,
    start,
)
from .options import option, parse

# Defaults of other options by stage.
STAGES = {
    "align": {},
    "text": {"align_weight": 0.0, "energy_weight": 0.0, "gen_text_weight": 1.0, "text_lora": True},
    "joint": {"gen_text_weight": 1.0, "text_lora": True},
}


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    stage: str = option("What to train: align, text or joint.", "align")
    model: str | None = option(
        "Hub id or folder of a base, a vision-language model or a model with branches, or digits."
    )
    model_revision: str | None = option(REVISION)
    lora_rank: int | None = option("Rank of the LoRA updates. Defaults to 4.")
    lora_alpha: float | None = option("Scale of the updates times their rank. Defaults to 8.")
    lora_dropout: float | None = option("Dropout on the input of the updates. Defaults to 0.")
    train_real: bool = option("Also train the real branch, which the paper freezes.", False)
    text_lora: bool = option("Add a LoRA adapter to the text encoder.", False)
    fit_detector: bool = option('Fit a detector of generated images, for modality "auto".', False)
    attn_implementation: str | None = option(ATTENTION)


@dataclass
class DataArguments(PairArguments):
    generated_image_column: str = option("Column with the generated images.", "generated_image")
    image_id_column: str = option("Column with the ids of the real images.", "image_id")


def parse_args(argv: Sequence[str]):
    """
    Parse a command line into `(ModelArguments, DataArguments, GmailTrainingArguments)`.

    Raises:
        ValueError: see [`options.parse`]; also if `--dataset` is given without `--model`.
    """
    from ..training.arguments import GmailTrainingArguments

    dataclasses = (ModelArguments, DataArguments, GmailTrainingArguments)
    args = parse(argv, "train", __doc__, dataclasses, default_config="digits", stages=STAGES)
    model, data, _ = args
    if model.model is None:
        if data.dataset != "digits":
            raise ValueError(
                f"Pass the model to train on '{data.dataset}' with --model. The paper uses "
                "openai/clip-vit-large-patch14."
            )
        model.model = "digits"
    return args


def main(argv: Sequence[str]) -> dict[str, float]:
    """Train and return the metrics of the evaluation split, if there is one."""
    model_args, data_args, training_args = parse_args(argv)

    import datasets
    import torch

    from ..training.checks import check_pairs, needed_columns
    from ..training.detector import fit_detector
    from ..training.loading import check_free_disk
    from ..training.trainer import GmailTrainer

    checkpoint = start(training_args, data_args.dataset)

    columns = {
        "real_image": data_args.real_image_column,
        "generated_image": data_args.generated_image_column,
        "caption": data_args.caption_column,
        "image_id": data_args.image_id_column,
    }
    train_dataset, eval_dataset = data_args.load(training_args, columns)
    needed = needed_columns(training_args)
    for split, dataset in ((data_args.split, train_dataset), (data_args.eval_split, eval_dataset)):
        if dataset is not None:
            check_pairs(
                dataset,
                data_args.title(split),
                training_args.on_bad_image,
                needed,
                with_negatives=training_args.needs_negatives,
            )
    adapters = {
        "lora_rank": model_args.lora_rank,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "trainable_modalities": ["real", "gen"] if model_args.train_real else None,
    }
    adapters = {name: value for name, value in adapters.items() if value is not None}
    attention = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    model, processor = load_two_branches(
        model_args.model, model_args.model_revision, adapters, dtype=torch.float32, **attention
    )
    if model_args.text_lora and not getattr(model.config, "text_lora", False):
        model.add_text_lora()
    for name, value in adapters.items():
        if getattr(model.config, name) != value:
            raise ValueError(
                f"'{model_args.model}' has adapters with {name}={getattr(model.config, name)}, not {value}. Leave out "
                f"--{name}, or start from its base."
            )
    check_free_disk(training_args.output_dir, bytes_of_checkpoints(model, training_args, len(train_dataset)))
    check_free_disk(datasets.config.HF_DATASETS_CACHE, len(train_dataset) * model.embed_dim * 4)

    trainer = GmailTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    if model_args.fit_detector:  # of the frozen branch: it need not wait for training
        scores = fit_detector(
            trainer.model,
            processor,
            train_dataset,
            training_args.generated_modality,
            batch_size=training_args.per_device_eval_batch_size,
            on_bad_image=training_args.on_bad_image,
            seed=training_args.seed,
            barrier=trainer.accelerator.wait_for_everyone,
            rank=training_args.process_index,
            world_size=training_args.world_size,
        )
        report(trainer, "detector", {f"detector_{name}": value for name, value in scores.items()})
    if eval_dataset is not None and checkpoint is None:
        report(trainer, "before", trainer.evaluate(metric_key_prefix="before"))
    training = fit(trainer, checkpoint)
    trainer.save_model(_internal_call=True)  # without a push, which follows
    report(trainer, "train", {**training, **trainer.cost()})
    metrics = trainer.evaluate() if eval_dataset is not None else {}
    if metrics:
        report(trainer, "eval", metrics)
    if trainer.skipped_pairs:
        logger.warning(f"Pairs were skipped {trainer.skipped_pairs} times because an image could not be read.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=data_args.dataset)
    else:
        trainer.create_model_card(dataset=data_args.dataset)
    logger.info(f"The model and its adapters are in {training_args.output_dir}.")
    return metrics


if __name__ == "__main__":
    run("train")
