"""
Train LLaVA, or a projector to a language model such as Llama 3, on generated images, then ask about real ones.

These commands align the gen branch on the bundled digits, then train a projector from this branch to the bundled
language model. They take minutes, without a download (pip install "gmail-hf[digits]"):

    gmail-hf train
    gmail-hf vlm

LLaVA-1.5 with its published settings needs a GMAIL CLIP that was aligned on LLaVA's own CLIP, ViT-L/14 at 336 px.
Llama 3 needs any GMAIL CLIP and gets a new projector. The files are in examples/configs of the repository:

    accelerate launch -m gmail_hf.commands.vlm --config llava_1.5_7b.yaml --model gmail-coco-336 \\
        --dataset org/coco-sd2 --output_dir llava-coco
    accelerate launch -m gmail_hf.commands.vlm --config llama3_8b.yaml --model gmail-coco \\
        --dataset org/coco-sd2 --output_dir llama3-coco

Two baselines train on generated images through the real branch (--modality real), and on real images, the upper bound
(--modality real --image_column real_image).

--train projector trains only the projector, --train projector+lora also trains LoRA on the language model. The vision
tower is frozen. If the data set has a column of conversations in the chat format of transformers, the model trains on
them. On the bundled digits it trains on questions about the scene, on other data on captions as answers to --question.

Options in the YAML file of --config are overridden by options on the command line. Without --config and --dataset, the
default is --config llava_digits. To continue an interrupted run, add --resume_from_checkpoint true. The output folder
gets the complete model, which pipeline("image-text-to-text") loads, and with LoRA also its PEFT adapter in adapter/.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_jsonl
from .cli import run
from .common import (
    ATTENTION,
    DTYPES,
    REVISION,
    PairArguments,
    bytes_of_checkpoints,
    check_trained,
    fit,
    logger,
    report,
    start,
)
from .options import option, parse

PRINTED = 5  # answers shown after training
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}  # the mixed precision that each --dtype needs


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model: str = option("Hub id or folder of a GmailCLIPModel from gmail-hf train.", "gmail-digits")
    model_revision: str | None = option(REVISION)
    llava: str | None = option(
        "Hub id or folder of a LLaVA with the CLIP of --model, or of a model from this command, which keeps its own "
        "vision tower. Its language model is used instead of --text_model."
    )
    text_model: str | None = option(
        "Hub id or folder of a language model, which gets a new projector, or digits, the bundled one."
    )
    text_model_revision: str | None = option("Revision of --llava or --text_model on the Hub.")
    chat_template: str | None = option("File with a chat template, for a language model without one.")
    train: str = option("What to train.", "projector", choices=("projector", "projector+lora"))
    lora_rank: int = option("Rank of LoRA on the language model.", 128)
    lora_alpha: float = option("Scale of the updates times their rank.", 256)
    lora_dropout: float = option("Dropout on the input of the updates.", 0.05)
    projector_learning_rate: float | None = option("Learning rate of the projector. Defaults to --learning_rate.")
    dtype: str = option(
        "Data type of the frozen weights. bfloat16 needs --bf16, float16 needs --fp16.", "float32", choices=DTYPES
    )
    attn_implementation: str | None = option(ATTENTION)


@dataclass
class DataArguments(PairArguments):
    eval_split: str = option("Split with the real images to ask about.", "validation")
    image_column: str = option(
        "Column with the images to train on: one image or a list of images per row.", "generated_image"
    )
    modality: str = option(
        "Branch for the images of --image_column: real or gen. A column modality sets it per row.", "gen"
    )
    messages_column: str = option("Column with conversations. It is used if it exists.", "messages")
    question: str = option("Question that captions answer.", "Provide a one-sentence caption for the provided image.")
    max_new_tokens: int = option("Maximum length of answers in the evaluation, in tokens.", 64)


def parse_args(argv: Sequence[str]):
    """
    Parse a command line into `(ModelArguments, DataArguments, TrainingArguments)`.

    Raises:
        ValueError: see [`options.parse`]; also without a language model, or with half-precision weights and without
            mixed precision.
    """
    from transformers import TrainingArguments

    dataclasses = (ModelArguments, DataArguments, TrainingArguments)
    args = parse(argv, "vlm", __doc__, dataclasses, default_config="llava_digits")
    model_args, _, training_args = args
    precision = PRECISIONS.get(model_args.dtype)
    if precision not in (None, training_args.mixed_precision):
        raise ValueError(f"--dtype {model_args.dtype} needs training in mixed precision: add --{precision}.")
    if model_args.llava is None and model_args.text_model is None:
        raise ValueError("Pass the language model with --llava or --text_model.")
    return args


def main(argv: Sequence[str]) -> dict[str, float]:
    """Train, ask about the real images of the evaluation split, and return the share of exact answers."""
    model_args, data_args, training_args = parse_args(argv)

    from ..branches.tower import cast_base
    from ..training.loading import check_free_disk
    from ..vlm import ConversationTrainer, LlavaCollator, check_processor, language_model_lora
    from ..vlm.training import optimizer_of
    from .bundled import conversations

    checkpoint = start(training_args, data_args.dataset)
    if checkpoint is not None:
        adapter = Path(checkpoint, "adapter_config.json")
        written = "projector+lora" if adapter.exists() else "projector"
        if model_args.train != written:
            raise ValueError(f"'{checkpoint}' was written with --train {written}: add it to resume.")
        lora = json.loads(adapter.read_text(encoding="utf-8")) if adapter.exists() else {}
        for name, value in (("lora_rank", lora.get("r")), ("lora_alpha", lora.get("lora_alpha"))):
            if lora and value != getattr(model_args, name):
                raise ValueError(f"'{checkpoint}' was written with --{name} {value}: add it to resume.")
    training_args.remove_unused_columns = False  # the collator needs the conversations
    # The Trainer would push adapters together with the whole model, as if the folder were an adapter.
    push_to_hub, training_args.push_to_hub = training_args.push_to_hub, False

    columns = data_args.found(data_args.image_column) | {"caption": data_args.caption_column}
    train_rows, eval_rows = data_args.load(training_args, columns, data_args.image_column, data_args.messages_column)
    train_dataset, eval_dataset = (
        conversations(
            rows,
            image_column,
            data_args.title(split),
            messages_column=data_args.messages_column,
            caption_column="caption",
            question=data_args.question,
        )
        for rows, split, image_column in (
            (train_rows, data_args.split, data_args.image_column),
            (eval_rows, data_args.eval_split, data_args.real_image_column),
        )
    )
    model, processor = _model_and_processor(model_args)
    check_processor(processor, model.config)
    model.model.vision_tower.check_modalities([data_args.modality, "real"])
    for dataset in (train_dataset, eval_dataset):
        dataset.check(processor, model.config.vision_config.modalities)
    max_length = getattr(model.config.text_config, "max_position_embeddings", None)
    collator = LlavaCollator(processor, data_args.modality, max_length)
    collator([train_dataset[0], train_dataset[len(train_dataset) - 1]])  # raises errors before training
    if model_args.train == "projector":
        model.freeze_all_but_projector()
    else:
        from peft import get_peft_model

        lora = language_model_lora(model_args.lora_rank, model_args.lora_alpha, model_args.lora_dropout)
        model = get_peft_model(model, lora)
    dtype = model.dtype
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small steps would be lost in bfloat16
    check_free_disk(training_args.output_dir, bytes_of_checkpoints(model, training_args, len(train_dataset)))

    trainer = ConversationTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        data_collator=collator,
        processing_class=processor,
        optimizers=(optimizer_of(model, training_args, model_args.projector_learning_rate), None),
    )
    training = fit(trainer, checkpoint)
    report(trainer, "train", {**training, **trainer.cost()})
    output_dir = Path(training_args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model_args.train == "projector+lora":
        if training_args.should_save:
            model.save_pretrained(output_dir / "adapter")
            (output_dir / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's template, not filled in
        model = model.merge_and_unload()
    cast_base(model, dtype)
    if training_args.should_save:
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
    metrics = ask(model, processor, eval_dataset, training_args, data_args.max_new_tokens)
    report(trainer, "eval", metrics)
    if push_to_hub and training_args.should_save:
        repo_id = training_args.hub_model_id or output_dir.name
        for part in (model, processor):
            part.push_to_hub(
                repo_id,
                private=training_args.hub_private_repo,
                token=training_args.hub_token,
                revision=training_args.hub_revision,
            )
    logger.info(f"The model and its answers are in {output_dir}.")
    return metrics


def _model_and_processor(args: ModelArguments):
    import torch
    from transformers import AutoConfig, AutoProcessor

    from ..vlm import GmailLlavaForConditionalGeneration, build_processor
    from .bundled import text_model_path

    settings = {"dtype": getattr(torch, args.dtype), "attn_implementation": args.attn_implementation}
    if args.llava is not None:
        processor = AutoProcessor.from_pretrained(args.llava, revision=args.text_model_revision)
        if AutoConfig.from_pretrained(args.llava, revision=args.text_model_revision).model_type == "gmail_llava":
            logger.info(f"Using the vision tower of '{args.llava}', not that of --model.")
            model = GmailLlavaForConditionalGeneration.from_pretrained(
                args.llava, revision=args.text_model_revision, **settings
            )
            return model, processor
    check_trained(args.model)
    if args.llava is not None:
        model = GmailLlavaForConditionalGeneration.from_llava(
            args.llava,
            gmail=args.model,
            gmail_revision=args.model_revision,
            revision=args.text_model_revision,
            **settings,
        )
        return model, processor
    text_model = text_model_path(args.text_model)
    revisions = {"vision_revision": args.model_revision, "text_revision": args.text_model_revision}
    template = Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template else None
    processor = build_processor(args.model, text_model, chat_template=template, **revisions)
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(
        args.model, text_model, processor, **revisions, **settings
    )
    return model, processor


def ask(model, processor, dataset, training_args, max_new_tokens: int) -> dict[str, float]:
    """Ask the first question of each conversation. The main process writes predictions.jsonl."""
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from ..evaluation.answering import write
    from ..training.data import BadImageError, decode_image
    from ..vlm.conversations import count_images, text_of

    model.eval()
    answers = []
    size = training_args.per_device_eval_batch_size
    mine = range(training_args.process_index, len(dataset), training_args.world_size)
    for first in tqdm(range(0, len(mine), size), desc="Answers", disable=not training_args.should_log):
        asked, images = [], []
        for index in mine[first : first + size]:
            example = dataset[index]
            turn = [message["role"] for message in example["messages"]].index("assistant")
            prompt, reference = example["messages"][:turn], example["messages"][turn]
            shown = example["images"][: count_images(prompt, processor.image_token)]
            try:
                images.append([decode_image(image) for image in shown])
            except BadImageError as error:
                logger.warning(f"{dataset.name}, row {index // len(dataset.kinds)}, is skipped: {error}.")
                continue
            asked.append((index, example["kind"], prompt, reference))
        if not asked:
            continue
        prompts = [prompt for _, _, prompt, _ in asked]
        written = write(model, processor, images, prompts, "real", max_new_tokens=max_new_tokens, do_sample=False)
        for (index, kind, prompt, reference), answer in zip(asked, written, strict=True):
            answers.append((index, kind, text_of(prompt[-1]), answer, text_of(reference)))
    answers = sorted(gather_object(answers))
    missing = len(dataset) - len(answers)
    if missing:
        logger.warning(f"{missing} of {len(dataset)} questions were skipped. The scores do not include them.")
    if training_args.should_save:
        names = ("row", "kind", "question", "prediction", "reference")
        lines = [dict(zip(names, (index // len(dataset.kinds), *answer), strict=True)) for index, *answer in answers]
        write_jsonl(Path(training_args.output_dir, "predictions.jsonl"), lines)
        for _, _, question, answer, reference in answers[:PRINTED]:
            logger.info(f"  {question} {answer}    (reference: {reference})")
    metrics = {}
    for kind in dataset.kinds:
        exact = [answer == reference.strip() for _, name, _, answer, reference in answers if name == kind]
        if exact:
            metrics[f"eval_{kind}_exact_match"] = sum(exact) / len(exact)
    if not metrics:
        raise ValueError(
            f"{dataset.name} has no image that can be read. The trained model is saved in {training_args.output_dir}; "
            "pass another --eval_split to evaluate it."
        )
    return {**metrics, "eval_exact_match": sum(metrics.values()) / len(metrics)}


if __name__ == "__main__":
    run("vlm")
