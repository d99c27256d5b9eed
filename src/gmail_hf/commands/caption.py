"""
Train a ClipCap or IFCap captioner on generated images, then caption real ones: stages 2 and 3 of GMAIL.

These commands align the gen branch on the bundled digits, then train a captioner on this branch. They take minutes,
without a download (pip install "gmail-hf[digits,captioning]", and Java for the scores):

    gmail-hf train
    gmail-hf caption

Two baselines train on generated images through the real branch, and on real images (the upper bound):

    gmail-hf caption --modality real --output_dir clipcap-taken-for-real
    gmail-hf caption --modality real --image_column real_image --output_dir clipcap-real

IFCap also retrieves captions of the training split, and adds entities that many of them mention to its prompt:

    gmail-hf caption --architecture ifcap
    gmail-hf caption --architecture ifcap --text_only true --output_dir ifcap-text-only

Options in the YAML file of --config are overridden by options on the command line. Without --config and --dataset, the
default is --config clipcap_digits or ifcap_digits. To continue an interrupted run, add --resume_from_checkpoint true.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import replacing, write_jsonl
from .cli import run
from .common import ATTENTION, REVISION, PairArguments, bytes_of_checkpoints, check_trained, fit, logger, report, start
from .options import REQUIRED, given, option, parse

ARCHITECTURES = ("clipcap", "ifcap")
PRINTED, PICTURED = 5, 16  # captions shown after training


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model: str = option("Hub id or folder of a model with branches from gmail-hf train.", REQUIRED)
    model_revision: str | None = option(REVISION)
    architecture: str = option("The captioner: clipcap or ifcap.", "clipcap")
    text_model: str = option(
        "Hub id or folder of a causal language model, or digits, the bundled one.", "openai-community/gpt2"
    )
    text_model_revision: str | None = option("Revision of --text_model on the Hub.")
    mapping_type: str | None = option("ClipCap's mapping network: mlp or transformer. Defaults to mlp.")
    prefix_length: int = option("Number of token embeddings per image.", 10)
    freeze_text_model: bool = option("Train only the mapping network.", False)
    attn_implementation: str | None = option(ATTENTION)


@dataclass
class IFCapArguments:
    _argument_group_name = "ifcap"

    text_only: bool = option("Train on embeddings of captions with noise instead of images.", False)
    entities: str = option(
        "Entities in captions: nltk, for nouns found by NLTK, or a file with one word per line.", "nltk"
    )
    num_retrieved: int = option("Number of captions to retrieve for an image's prefix.", 5)
    num_entity_captions: int = option("Number of captions to retrieve for counting entities; 7 for Flickr30k.", 9)
    entity_threshold: int = option(
        "Entities in more than this number of retrieved captions are used; 3 for Flickr30k.", 5
    )
    noise_variance: float = option("Variance of the noise of --text_only, per entry of a unit embedding.", 0.04)


@dataclass
class DataArguments(PairArguments):
    eval_split: str = option("Split with the real images to caption.", "validation")
    image_column: str = option(
        "Column with the images to train on. A column of embeddings, generated_embeds or real_embeds, is used instead "
        "of generated_image or real_image if it exists.",
        "generated_image",
    )
    modality: str = option("Branch for the images of --image_column: real or gen.", "gen")
    image_id_column: str = option(
        "Column with image ids. Captions with the same id are references of one image.", "image_id"
    )
    num_beams: int = option("Number of beams for generating a caption.", 5)
    max_new_tokens: int | None = option(
        "Maximum length of captions in the evaluation, in tokens. Defaults to the language model's limit."
    )
    caption_metrics: list[str] = option(
        "Scores to compute. METEOR takes ten seconds to start.", ["BLEU@4", "METEOR", "CIDEr", "ROUGE-L"]
    )

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens"):  # used after training
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


def parse_args(argv: Sequence[str]):
    """
    Parse a command line into `(ModelArguments, IFCapArguments, DataArguments, TrainingArguments)`.

    Raises:
        ValueError: see [`options.parse`]; also an unknown architecture, or an option of another one.
    """
    from transformers import TrainingArguments

    dataclasses = (ModelArguments, IFCapArguments, DataArguments, TrainingArguments)
    default_config = "ifcap_digits" if given(argv, "architecture") == "ifcap" else "clipcap_digits"
    parsed = parse(argv, "caption", __doc__, dataclasses, default_config)
    architecture, values = parsed[0].architecture, vars(parsed[1])
    if architecture not in ARCHITECTURES:
        raise ValueError(f"Unknown --architecture '{architecture}'; choose from {', '.join(ARCHITECTURES)}.")
    changed = [f"--{name}" for name, value in vars(IFCapArguments()).items() if values[name] != value]
    if architecture != "ifcap" and changed:
        raise ValueError(f"{', '.join(changed)} can only be used with --architecture ifcap.")
    return parsed


def main(argv: Sequence[str]) -> dict[str, float]:
    """Train, caption the evaluation split, and return its metrics."""
    model_args, ifcap_args, data_args, training_args = parse_args(argv)

    import torch
    from accelerate import PartialState
    from transformers import AutoTokenizer

    from ..captioners import (
        CAPTIONERS,
        CaptionCollator,
        CaptionTrainer,
        ClipCapProcessor,
        captioned_embeds,
        check_captions,
        with_caption_rows,
    )
    from ..metrics.caption_scores import missing_metrics
    from ..publishing.provenance import public_name
    from ..training.data import image_processor_of
    from ..training.embeddings import cached_embeds
    from ..training.loading import check_free_disk
    from .bundled import entity_finder, text_model_path
    from .common import load_two_branches

    checkpoint = start(training_args, data_args.dataset)
    for metric, remedy in missing_metrics(data_args.caption_metrics).items():
        logger.warning(f"{metric} will be missing: {remedy}.")
    training_args.remove_unused_columns = False  # the collator needs the captions
    retrieves = model_args.architecture == "ifcap"
    find_entities = entity_finder(ifcap_args.entities) if retrieves else None

    names = {"caption": data_args.caption_column, "image_id": data_args.image_id_column}
    trained = [] if ifcap_args.text_only else [data_args.image_column]
    train_pairs, eval_pairs = data_args.load(training_args, data_args.found(*trained) | names, data_args.image_column)
    for pairs, split, columns in (
        (train_pairs, data_args.split, trained),
        (eval_pairs, data_args.eval_split, [data_args.real_image_column]),
    ):
        needed = [*(_embeds_column(pairs, column) or column for column in columns), *names]
        missing = [column for column in needed if column not in pairs.column_names]
        if missing:
            raise ValueError(f"{data_args.title(split)} lacks the column(s) {missing}; it has {pairs.column_names}.")
        check_captions(pairs, data_args.caption_column)

    name, text_name = model_args.model, text_model_path(model_args.text_model)
    check_trained(name)
    fields = {"mapping_type": model_args.mapping_type, "prefix_length": model_args.prefix_length}
    if retrieves:
        fields |= {field: value for field, value in vars(ifcap_args).items() if field not in ("text_only", "entities")}
    model = CAPTIONERS[model_args.architecture].from_vision_text_pretrained(
        name,
        text_name,
        vision_revision=model_args.model_revision,
        text_revision=model_args.text_model_revision,
        dtype=torch.float32,
        attn_implementation=model_args.attn_implementation,
        **{field: value for field, value in fields.items() if value is not None},
    )
    if model_args.freeze_text_model:
        model.freeze_text_model()
    # Each checkpoint has a bank: float32 embeddings of the distinct captions; its texts add a twentieth.
    bank = len(set(train_pairs["caption"])) * model.vision_model.embed_dim * 4 if retrieves else 0
    needed = bytes_of_checkpoints(model, training_args, len(train_pairs), bank)
    check_free_disk(training_args.output_dir, needed)
    gmail, processor = load_two_branches(name, model_args.model_revision)
    gmail.to(training_args.device).tower.check_modalities([data_args.modality, "real"])
    image_processor = image_processor_of(processor)
    tokenizer = AutoTokenizer.from_pretrained(text_name, revision=model_args.text_model_revision)
    collator = CaptionCollator(tokenizer)
    room = model.config.max_caption_length
    if room is not None and room < collator.max_length:
        logger.warning(
            f"Captions are truncated to {room} tokens, which with the prefix fill the language model's context."
        )
        collator.max_length = room
    if retrieves:
        model.set_caption_bank(_caption_bank(train_pairs, gmail, processor.tokenizer, find_entities, tokenizer))

    def embed(pairs, column: str, encoder, modality: str):
        if precomputed := _embeds_column(pairs, column):
            embeds = pairs.select_columns([precomputed]).rename_column(precomputed, "image_embeds")
            return captioned_embeds(pairs, embeds)
        embeds = cached_embeds(
            pairs,
            column,
            encoder,
            image_processor,
            modality=modality,
            batch_size=training_args.per_device_eval_batch_size,
            barrier=PartialState().wait_for_everyone,
            rank=training_args.process_index,
            world_size=training_args.world_size,
        )
        return captioned_embeds(pairs, embeds)

    if ifcap_args.text_only:
        train_dataset = train_pairs.select_columns(["caption", "image_id"])
    else:
        train_dataset = embed(train_pairs, data_args.image_column, gmail, data_args.modality)
    if retrieves:
        train_dataset = with_caption_rows(train_dataset, model.caption_bank)
    eval_dataset = embed(eval_pairs, data_args.real_image_column, gmail, "real")
    del gmail  # the captioner has its own copy of the image encoder

    trainer = CaptionTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=ClipCapProcessor(image_processor, tokenizer),
    )
    training = fit(trainer, checkpoint)
    trainer.save_model(_internal_call=True)  # without a push, which follows
    report(trainer, "train", {**training, **trainer.cost()})
    metrics = {**trainer.evaluate(), **_caption(trainer, eval_dataset, eval_pairs, data_args)}
    report(trainer, "eval", metrics)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=public_name(data_args.dataset), tags=["gmail", model_args.architecture])
    logger.info(f"The captioner and its captions are in {training_args.output_dir}.")
    return metrics


def _embeds_column(pairs, column: str) -> str | None:
    """The column of embeddings that is used instead of an image column; None if there is none."""
    name = column.replace("_image", "_embeds")
    return name if name != column and name in pairs.column_names else None


def _caption_bank(pairs, gmail, text_tokenizer, find_entities: Callable[[str], list[str]], tokenizer):
    """Build the bank of unique training captions for retrieval."""
    from ..captioners import CaptionBank
    from ..training.embeddings import embed_texts

    captions = list(dict.fromkeys(pairs["caption"]))
    embeds = embed_texts(gmail.eval(), text_tokenizer, captions, desc="Embedding captions")
    return CaptionBank.build(captions, embeds, find_entities, tokenizer, desc="Finding entities")


def _caption(trainer, dataset, pairs, data_args: DataArguments) -> dict[str, float]:
    """Caption each image once and score the captions. The main process writes captions.jsonl and captions.png."""
    from accelerate.utils import gather_object

    from ..captioners import caption_embeds, group_references
    from ..metrics import plot_pairs
    from ..metrics.caption_scores import caption_metrics, exact_match

    args = trainer.args
    rows, references = group_references(dataset["caption"][:], dataset["image_id"][:])
    mine = range(args.process_index, len(rows), args.world_size)
    written = caption_embeds(
        trainer.model,
        trainer.processing_class.tokenizer,
        dataset.select([rows[i] for i in mine])["image_embeds"][:],
        batch_size=args.per_device_eval_batch_size,
        desc="Captions" if args.should_log else None,
        num_beams=data_args.num_beams,
        do_sample=False,
        **({"max_new_tokens": data_args.max_new_tokens} if data_args.max_new_tokens else {}),
    )
    captions = [caption for _, caption in sorted(gather_object(list(zip(mine, written, strict=True))))]
    scores = caption_metrics(captions, references, data_args.caption_metrics)
    scores |= {"exact_match": exact_match(captions, references)}
    if args.should_save:
        ids = dataset.select(rows)["image_id"][:]
        lines = [
            {"image_id": image_id, "caption": caption, "references": truths}
            for image_id, caption, truths in zip(ids, captions, references, strict=True)
        ]
        write_jsonl(Path(args.output_dir, "captions.jsonl"), lines)
        for caption, truths in list(zip(captions, references, strict=True))[:PRINTED]:
            logger.info(f"  {caption}    (reference: {truths[0]})")
        texts = [
            f"{' '.join(caption.split())}\nreference: {caption if exact_match([caption], [truths]) else truths[0]}"
            for caption, truths in zip(captions, references, strict=True)
        ]
        shown = _shown(pairs, data_args.real_image_column, ids[:PICTURED])
        if shown:
            with replacing(Path(args.output_dir, "captions.png")) as partial:
                plot_pairs(partial, list(shown.values()), None, [texts[number] for number in shown])
    return {f"eval_{name}": score for name, score in scores.items() if score is not None}


def _shown(pairs, column: str, ids: Sequence[str]) -> dict[int, Any]:
    """The images of some ids by their number. With given embeddings, images may be missing or unreadable."""
    from ..training.data import BadImageError, decode_image, undecoded

    images = {}
    if column in pairs.column_names:
        all_ids = pairs["image_id"][:]
        for number, row in enumerate(undecoded(pairs.select([all_ids.index(i) for i in ids]))):
            try:
                images[number] = decode_image(row[column])
            except BadImageError:
                continue
    return images


if __name__ == "__main__":
    run("caption")
