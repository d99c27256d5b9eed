"""
Train the branches of a GMAIL CLIP on pairs of generated and real images, and its text encoder on generated ones.

The embedded default, in minutes and without a download (needs `pip install "gmail-hf[digits]"`):

    accelerate launch examples/train_gmail.py

COCO with the paper's settings on 8 GPUs, 32 pairs each:

    accelerate launch --multi_gpu --num_processes 8 examples/train_gmail.py \\
        --config examples/configs/coco.yaml --dataset_name org/coco-sd2 --output_dir gmail-coco

`--stage` chooses what is trained; every weight can also be given by itself:

    align   the gen branch, by Eq. 1 (the default)
    text    a LoRA adapter on the text encoder, by image-text contrast on f_g(generated images), both branches frozen;
            photographs then meet the trained text encoder through the real branch. Needs no real images to train on.
    joint   both at once: Eq. 1 and the image-text contrast

    accelerate launch examples/train_gmail.py --config examples/configs/digits_text.yaml

Settings come from `--config`, a YAML file of the options below, and then from the command line, which wins. Without
`--config` and `--dataset_name` the file is examples/configs/digits.yaml; all other defaults are the paper's, its batch
of 256 counted a device. An interrupted run goes on with `--resume_from_checkpoint true`.
"""

import logging
import sys
from dataclasses import dataclass, field

from _common import CONFIGS, PairArguments, bytes_of_checkpoints, parse_args

# Defaults that a stage brings.
STAGES = {
    "align": {},
    "text": {"align_weight": 0.0, "gen_text_weight": 1.0, "text_lora": True},
    "joint": {"gen_text_weight": 1.0, "text_lora": True},
}


@dataclass
class ModelArguments:
    stage: str = field(default="align", metadata={"help": "'align', 'text' or 'joint'; see above."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A CLIP or a GmailCLIPModel, by Hub id or folder, or 'digits', the CLIP that comes along and the "
            "default for its own pairs."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    lora_rank: int | None = field(default=None, metadata={"help": "Rank of the LoRA updates; 4 by default."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Their scale times the rank; 8 by default."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout on their input; 0 by default."})
    train_real: bool = field(default=False, metadata={"help": "Train the real branch too; the paper freezes it."})
    text_lora: bool = field(default=False, metadata={"help": "Put a LoRA adapter on the text encoder."})
    attn_implementation: str | None = field(default=None, metadata={"help": "'sdpa', 'eager', 'flash_attention_2'."})


@dataclass
class DataArguments(PairArguments):
    eval_split: str | None = field(default=None, metadata={"help": "The split to evaluate on; none by default."})
    real_image_column: str = field(default="real_image", metadata={"help": "The column of real images."})
    generated_image_column: str = field(default="generated_image", metadata={"help": "Of generated images."})
    caption_column: str = field(default="caption", metadata={"help": "Of captions."})
    image_id_column: str = field(default="image_id", metadata={"help": "Of ids of the real images."})


def parse(argv: list[str]):
    """
    `(ModelArguments, DataArguments, GmailTrainingArguments)` of a command line.

    Raises:
        ValueError: pairs of one's own, and no model for them.
    """
    from gmail_hf import GmailTrainingArguments

    dataclasses = (ModelArguments, DataArguments, GmailTrainingArguments)
    args = parse_args(argv, dataclasses, __doc__, default_config=CONFIGS / "digits.yaml", stages=STAGES)
    model, data, _ = args
    if model.model_name_or_path is None:
        if data.dataset_name != "digits":
            raise ValueError(
                f"Which CLIP is to be trained on '{data.dataset_name}'? Name it by --model_name_or_path; the "
                "paper's is openai/clip-vit-large-patch14."
            )
        model.model_name_or_path = "digits"
    return args


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse(sys.argv[1:] if argv is None else argv)

    import datasets
    import torch
    from transformers import AutoConfig, AutoProcessor, set_seed

    from gmail_hf import GmailCLIPModel, GmailTrainer
    from gmail_hf.training.data import check_pairs
    from gmail_hf.training.loading import check_free_disk, check_output_dir

    logging.basicConfig(format="%(message)s")
    logger = logging.getLogger("gmail_hf")
    logger.setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    checkpoint = check_output_dir(training_args.output_dir, training_args.resume_from_checkpoint)
    set_seed(training_args.seed)

    def load(split: str, max_samples: int | None) -> datasets.Dataset:
        with training_args.main_process_first(desc="loading pairs"):
            dataset = data_args.load(
                split,
                max_samples,
                {
                    "real_image": data_args.real_image_column,
                    "generated_image": data_args.generated_image_column,
                    "caption": data_args.caption_column,
                    "image_id": data_args.image_id_column,
                },
            )
        name = f"Split '{split}' of '{data_args.dataset_name}'"
        check_pairs(dataset, name, training_args.on_bad_image, training_args.loss_config().columns)
        return dataset

    train_dataset = load(data_args.train_split, data_args.max_train_samples)
    eval_dataset = load(data_args.eval_split, data_args.max_eval_samples) if data_args.eval_split else None

    name = model_args.model_name_or_path
    if name == "digits":
        from gmail_hf.digits import clip_path

        name = clip_path()
    hub = {"revision": model_args.model_revision} if model_args.model_revision else {}
    processor = AutoProcessor.from_pretrained(name, **hub)
    if model_args.attn_implementation:
        hub["attn_implementation"] = model_args.attn_implementation
    adapters = {
        "lora_rank": model_args.lora_rank,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "trainable_modalities": ["real", "gen"] if model_args.train_real else None,
        "text_lora": model_args.text_lora or None,
    }
    adapters = {field: value for field, value in adapters.items() if value is not None}
    if AutoConfig.from_pretrained(name, **hub).model_type == "gmail_clip":
        model = GmailCLIPModel.from_pretrained(name, dtype=torch.float32, **hub)
        if model_args.text_lora and not model.config.text_lora:
            model.add_text_lora()
        for field_name, value in adapters.items():
            if getattr(model.config, field_name) != value:
                raise ValueError(
                    f"'{name}' has adapters with {field_name}={getattr(model.config, field_name)}, not {value}; leave "
                    "the option out, or start from its CLIP."
                )
    else:
        model = GmailCLIPModel.from_clip(name, dtype=torch.float32, **adapters, **hub)
    check_free_disk(training_args.output_dir, bytes_of_checkpoints(model, training_args))
    check_free_disk(datasets.config.HF_DATASETS_CACHE, len(train_dataset) * model.config.projection_dim * 4)

    trainer = GmailTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )
    before = trainer.evaluate(metric_key_prefix="before") if eval_dataset is not None and checkpoint is None else {}
    training = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    after = trainer.evaluate() if eval_dataset is not None else {}
    for name, metrics in (("train", {**training, **trainer.cost()}), ("before", before), ("eval", after)):
        if metrics:
            trainer.log_metrics(name, metrics)
            trainer.save_metrics(name, metrics)
    if trainer.skipped_pairs:
        logger.warning(f"{trainer.skipped_pairs} times a pair was skipped because an image could not be read.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=data_args.dataset_name)
    else:
        trainer.create_model_card(dataset=data_args.dataset_name)
    logger.info(f"The model and its adapters are in {training_args.output_dir}.")
    return after


if __name__ == "__main__":
    main()
