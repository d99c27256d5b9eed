"""
Train LLaVA, or a projector to a language model such as Llama 3, on generated images, then ask about real ones: GMAIL,
stages 2 and 3.

The embedded default, in minutes and without a download (needs `pip install "gmail-hf[digits]"`). Stage 1 first, then a
projector from its `gen` branch to the small language model that comes along:

    accelerate launch examples/train_gmail.py
    accelerate launch examples/train_llava.py

The same with generated images taken for real ones, and the upper bound, real images:

    accelerate launch examples/train_llava.py --modality real --output_dir llava-taken-for-real
    accelerate launch examples/train_llava.py --modality real --image_column real_image --output_dir llava-real

LLaVA-1.5 with its published settings, on a GMAIL CLIP that was aligned on LLaVA's own CLIP, ViT-L/14 at 336 px; and
Llama 3 with a projector of its own:

    accelerate launch examples/train_llava.py --config examples/configs/llava_1.5_7b.yaml \\
        --gmail_name_or_path gmail-coco-336 --dataset_name org/coco-sd2 --output_dir llava-coco
    accelerate launch examples/train_llava.py --config examples/configs/llama3_8b.yaml \\
        --gmail_name_or_path gmail-coco --dataset_name org/coco-sd2 --output_dir llama3-coco

`--train` chooses what is trained, the `projector` or, with LoRA on the language model, `projector+lora`; the vision
tower stays as stage 1 left it. A data set with a column of conversations in transformers' chat format is trained on
these; digits scenes on the questions of `gmail_hf.digits.questions`; any other on its captions, as answers to
`--question`.

Settings come from `--config`, a YAML file of the options below, and then from the command line, which wins. Without
`--config` and `--dataset_name` the file is examples/configs/llava_digits.yaml. An interrupted run goes on with
`--resume_from_checkpoint true`. The output folder then holds the whole model, for
`pipeline("image-text-to-text", ...)`, and with LoRA its PEFT adapter in `adapter/`.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from _common import CONFIGS, PairArguments, bytes_of_checkpoints, check_trained, parse_args

PRINTED = 5  # answers shown after training
DTYPES = {"float32": None, "bfloat16": "bf16", "float16": "fp16"}  # and the mixed precision that they train in

logger = logging.getLogger("gmail_hf")


@dataclass
class ModelArguments:
    gmail_name_or_path: str = field(
        default="gmail-digits",
        metadata={"help": "A GmailCLIPModel that examples/train_gmail.py trained, by Hub id or folder."},
    )
    gmail_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    llava_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A LLaVA on the same CLIP, or a model that this script wrote, whose vision tower is then its own; "
            "by Hub id or folder. Its language model takes the place of --text_model_name_or_path."
        },
    )
    text_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A language model for a fresh projector, or 'digits', the one that comes along."},
    )
    text_model_revision: str | None = field(default=None, metadata={"help": "Revision of either on the Hub."})
    chat_template: str | None = field(
        default=None, metadata={"help": "A file with a chat template, where the language model has none."}
    )
    train: str = field(default="projector", metadata={"help": "'projector' or 'projector+lora'; see above."})
    lora_rank: int = field(default=128, metadata={"help": "Rank of LoRA on the language model."})
    lora_alpha: float = field(default=256, metadata={"help": "Its scale times the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on its input."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector, if not --learning_rate."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Of the frozen weights; 'bfloat16' needs --bf16, 'float16' --fp16."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "'sdpa', 'eager', 'flash_attention_2'."})


@dataclass
class DataArguments(PairArguments):
    image_column: str = field(
        default="generated_image", metadata={"help": "The column of its images, one or a list of them a row,"}
    )
    modality: str = field(
        default="gen", metadata={"help": "and the branch they go through, unless a column 'modality' tells it."}
    )
    eval_split: str = field(default="validation", metadata={"help": "The split about whose real images is asked."})
    real_image_column: str = field(default="real_image", metadata={"help": "The column of these."})
    messages_column: str = field(default="messages", metadata={"help": "The column of conversations, if any."})
    caption_column: str = field(default="caption", metadata={"help": "The column of captions otherwise."})
    question: str = field(
        default="Provide a one-sentence caption for the provided image.", metadata={"help": "What captions answer."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer in the evaluation."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, ask about the real images of the evaluation split, and return the share of exact answers."""
    from transformers import TrainingArguments

    model_args, data_args, training_args = parse_args(
        sys.argv[1:] if argv is None else argv,
        (ModelArguments, DataArguments, TrainingArguments),
        __doc__,
        CONFIGS / "llava_digits.yaml",
    )

    if model_args.dtype not in DTYPES:
        raise ValueError(f"--dtype is one of {list(DTYPES)}, not '{model_args.dtype}'.")
    precision = DTYPES[model_args.dtype]
    if precision not in (None, training_args.mixed_precision):
        raise ValueError(f"--dtype {model_args.dtype} trains in mixed precision alone: add --{precision}.")
    if model_args.train not in ("projector", "projector+lora"):
        raise ValueError(f"--train is 'projector' or 'projector+lora', not '{model_args.train}'.")

    from transformers import set_seed

    from gmail_hf.commands.bundled import conversations
    from gmail_hf.training.loading import check_free_disk, check_output_dir
    from gmail_hf.training.safe_trainer import SafeTrainer
    from gmail_hf.vlm import Conversations, LlavaCollator, check_processor, language_model_lora
    from gmail_hf.vlm.training import optimizer_of

    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    checkpoint = check_output_dir(training_args.output_dir, training_args.resume_from_checkpoint)
    if checkpoint is not None:
        written = "projector+lora" if Path(checkpoint, "adapter_config.json").exists() else "projector"
        if model_args.train != written:
            raise ValueError(f"'{checkpoint}' was written by --train {written}: resume it by that.")
    training_args.remove_unused_columns = False  # the collator needs the conversations
    # The Trainer would push adapters beside the whole model, as if the folder were an adapter.
    push_to_hub, training_args.push_to_hub = training_args.push_to_hub, False
    set_seed(training_args.seed)

    def load(split: str, image_column: str, max_samples: int | None) -> Conversations:
        with training_args.main_process_first(desc="loading pairs"):
            rows = data_args.load(split, max_samples)
        return conversations(
            rows,
            image_column,
            f"Split '{split}' of '{data_args.dataset_name}'",
            messages_column=data_args.messages_column,
            caption_column=data_args.caption_column,
            question=data_args.question,
        )

    train_dataset = load(data_args.train_split, data_args.image_column, data_args.max_train_samples)
    eval_dataset = load(data_args.eval_split, data_args.real_image_column, data_args.max_eval_samples)

    model, processor = _model_and_processor(model_args)
    check_processor(processor, model.config)
    model.model.vision_tower.check_modalities([data_args.modality, "real"])
    for dataset in (train_dataset, eval_dataset):
        dataset.check(processor, model.config.vision_config.modalities)
    max_length = getattr(model.config.text_config, "max_position_embeddings", None)
    collator = LlavaCollator(processor, data_args.modality, max_length)
    collator([train_dataset[0], train_dataset[len(train_dataset) - 1]])  # what cannot be learned is told now
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
    check_free_disk(training_args.output_dir, bytes_of_checkpoints(model, training_args))

    trainer = SafeTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        data_collator=collator,
        processing_class=processor,
        optimizers=(optimizer_of(model, training_args, model_args.projector_learning_rate), None),
    )
    training = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_state()
    training.update(trainer.cost())
    trainer.log_metrics("train", training)
    trainer.save_metrics("train", training)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model_args.train == "projector+lora":
        if training_args.should_save:
            model.save_pretrained(Path(training_args.output_dir, "adapter"))
            Path(training_args.output_dir, "adapter", "README.md").unlink(missing_ok=True)  # PEFT's empty form
        model = model.merge_and_unload()
    model = model.to(dtype)
    if training_args.should_save:
        model.save_pretrained(training_args.output_dir)
        processor.save_pretrained(training_args.output_dir)
    metrics = _ask(model, processor, eval_dataset, training_args, data_args.max_new_tokens)
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if push_to_hub and training_args.should_save:
        repo_id = training_args.hub_model_id or Path(training_args.output_dir).name
        for part in (model, processor):
            part.push_to_hub(repo_id, private=training_args.hub_private_repo, token=training_args.hub_token)
    logger.info(f"The model and its answers are in {training_args.output_dir}.")
    return metrics


def _model_and_processor(args: ModelArguments):
    import torch
    from transformers import AutoConfig, AutoProcessor

    from gmail_hf.vlm import GmailLlavaForConditionalGeneration, build_processor

    gmail, llava, text_model = args.gmail_name_or_path, args.llava_name_or_path, args.text_model_name_or_path
    if llava is None and text_model is None:
        raise ValueError("Give --llava_name_or_path or --text_model_name_or_path.")
    settings = {"dtype": getattr(torch, args.dtype), "attn_implementation": args.attn_implementation}
    if llava is not None:
        processor = AutoProcessor.from_pretrained(llava, revision=args.text_model_revision)
        if AutoConfig.from_pretrained(llava, revision=args.text_model_revision).model_type == "gmail_llava":
            model = GmailLlavaForConditionalGeneration.from_pretrained(
                llava, revision=args.text_model_revision, **settings
            )
            logger.info(f"The vision tower is that of '{llava}', not of --gmail_name_or_path.")
            return model, processor
    check_trained(gmail)
    if llava is not None:
        model = GmailLlavaForConditionalGeneration.from_llava(
            llava, gmail=gmail, gmail_revision=args.gmail_revision, revision=args.text_model_revision, **settings
        )
        return model, processor
    if text_model == "digits":
        from gmail_hf.digits import llama_path

        text_model = llama_path()
    revisions = {"vision_revision": args.gmail_revision, "text_revision": args.text_model_revision}
    template = Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template else None
    processor = build_processor(gmail, text_model, chat_template=template, **revisions)
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(
        gmail, text_model, processor, **revisions, **settings
    )
    return model, processor


def _ask(model, processor, dataset, training_args, max_new_tokens: int) -> dict[str, float]:
    """Ask the first question of each conversation; the main process writes predictions.jsonl."""
    import torch
    from accelerate.utils import gather_object
    from tqdm.auto import tqdm

    from gmail_hf.training.data import BadImageError, decode_image
    from gmail_hf.vlm.processing import lacks_bos

    model.eval()
    answers = []
    size = training_args.per_device_eval_batch_size
    mine = range(training_args.process_index, len(dataset), training_args.world_size)
    for start in tqdm(range(0, len(mine), size), desc="Answers", disable=not training_args.should_log):
        asked, prompts, images = [], [], []
        for index in mine[start : start + size]:
            example = dataset[index]
            turns = [message["role"] for message in example["messages"]].index("assistant")
            example["prompt"], example["reference"] = example["messages"][:turns], example["messages"][turns]
            text = processor.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True)
            try:
                images += [decode_image(image) for image in example["images"][: text.count(processor.image_token)]]
            except BadImageError as error:
                logger.warning(f"{dataset.name}, row {index // len(dataset.kinds)}, is not asked about: {error}.")
                continue
            asked.append((index, example))
            prompts.append(text)
        if not asked:
            continue
        inputs = processor(
            images=images or None,
            text=prompts,
            padding=True,
            padding_side="left",
            add_special_tokens=lacks_bos(processor, prompts[0]),
            return_tensors="pt",
        ).to(model.device, model.dtype)
        with torch.no_grad():
            output = model.generate(**inputs, modality="real", max_new_tokens=max_new_tokens, do_sample=False)
        written = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (index, example), answer in zip(asked, written, strict=True):
            question, reference = _text(example["prompt"][-1]), _text(example["reference"])
            answers.append((index, example["kind"], question, answer.strip(), reference))
    answers = sorted(gather_object(answers))
    missing = len(dataset) - len(answers)
    if missing:
        logger.warning(f"{missing} of {len(dataset)} questions were not asked: scores leave them out.")
    if training_args.should_save:
        with open(Path(training_args.output_dir, "predictions.jsonl"), "w", encoding="utf-8") as file:
            for index, kind, question, answer, reference in answers:
                row = index // len(dataset.kinds)
                line = {"row": row, "kind": kind, "question": question, "prediction": answer, "reference": reference}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for _, _, question, answer, reference in answers[:PRINTED]:
            logger.info(f"  {question} {answer}    (reference: {reference})")
    metrics = {}
    for kind in dataset.kinds:
        exact = [answer == reference for _, name, _, answer, reference in answers if name == kind]
        if exact:
            metrics[f"eval_{kind}_exact_match"] = sum(exact) / len(exact)
    if not metrics:
        raise ValueError(f"{dataset.name} has no image that can be read; the trained model is saved.")
    return {**metrics, "eval_exact_match": sum(metrics.values()) / len(metrics)}


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(item.get("text") or "" for item in content)


if __name__ == "__main__":
    main()
