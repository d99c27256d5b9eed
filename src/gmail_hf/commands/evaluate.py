"""
Score a model on the paper's benchmarks or on the bundled digits.

The first command evaluates on the digits in minutes, without a download (pip install "gmail-hf[digits,captioning]",
and Java for the scores of captions). The others stream benchmarks from the Hub:

    gmail-hf evaluate --model gmail-digits --captioner clipcap-digits --benchmarks digits --output_dir digits-scores
    gmail-hf evaluate --model org/gmail-coco --benchmarks coco,flickr30k,dtd,cars --output_dir coco-scores
    gmail-hf evaluate --model openai/clip-vit-base-patch32 --benchmarks dtd --limit 500 --output_dir clip-scores

Captions and questions need an image-text-to-text model, such as ClipCap or LLaVA:

    gmail-hf evaluate --model llava-coco --benchmarks scienceqa,mmmu,pope --output_dir llava-scores

--dataset NAME=DATASET replaces the data of a benchmark by a folder, a file or another Hub id with the same layout,
such as a clone of clip-benchmark/wds_vtab-dtd. For coco and flickr30k, it may be pairs with generated images, which
adds alignment scores. With any other NAME, you can evaluate on your own data: class folders (optionally with
classnames.txt and templates.txt), or images with captions in any layout that gmail-hf train reads:

    gmail-hf evaluate --model org/gmail-coco --benchmarks mine --dataset mine=photos --output_dir mine-scores

--probe fits a linear classifier on the training split and scores it on the test split of benchmarks with classes. It
is the default for models without text (DINOv2, ViT, SynCLR). The training images can be generated ones:

    gmail-hf evaluate --model facebook/dinov2-base --benchmarks dtd,pets --output_dir dino-scores
    gmail-hf evaluate --model org/gmail-dino --benchmarks pets --train_dataset pets=generated-pets \\
        --train_modality gen --output_dir gmail-dino-scores

The benchmarks are {benchmarks}.

The output folder gets NAME.json for each benchmark, and report.md and report.html for all of them. To continue an
interrupted evaluation, run the same command again: finished benchmarks are not repeated. --card gmail-digits adds the
scores to the model card in that folder, as text and as metadata. Options in the YAML file of --config are overridden
by options on the command line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_file
from .cli import run
from .common import DTYPES, REVISION, check_output_outside, device_of, hold_output_dir, logger
from .options import REQUIRED, option, parse


@dataclass
class EvaluationArguments:
    _argument_group_name = "evaluation"

    model: str = option("Hub id or folder of a model with branches, a base, or an image-text-to-text model.", REQUIRED)
    benchmarks: str = option("Names of benchmarks, separated by commas.", REQUIRED)
    output_dir: str = option("Folder for results and report.", REQUIRED)
    model_revision: str | None = option(REVISION)
    captioner: str | None = option("Image-text-to-text model for captions and questions, if --model embeds images.")
    captioner_revision: str | None = option("Revision of --captioner on the Hub.")
    modality: str = option("Branch for photographs: real, gen, or auto with a detector.", "real")
    dataset: list[str] = option("NAME=DATASET for each benchmark with other data, see above.", [])
    limit: int | None = option(
        "Evaluate only on this number of rows: the first ones, or rows of each class in turn in class folders and "
        "tables of labels, and of each subject in MMMU. A probe is trained on all rows."
    )
    probe: str | None = option(
        "Also fit a linear classifier: logistic follows SynCLR's protocol, sgd is for large data. Defaults to "
        "logistic for models without text.",
        choices=("logistic", "sgd"),
    )
    train_dataset: list[str] = option("NAME=DATASET for each benchmark with other training images for the probe.", [])
    train_modality: str | None = option("Branch for the probe's training images. Defaults to --modality.")
    batch_size: int = option("Images or texts per forward pass.", 64)
    num_beams: int = option("Number of beams for generating a caption.", 5)
    word_vectors: str | None = option("File in word2vec's format, such as GoogleNews', for WMD of captions.")
    clip_score_model: str | None = option(
        "CLIP for CLIPScore and RefCLIPScore of captions; published figures use openai/clip-vit-base-patch32."
    )
    dtype: str = option("Data type of the weights.", "float32", choices=DTYPES)
    device: str | None = option("Device. Defaults to the GPU if there is one.")
    card: str | None = option(
        "Model card, or its folder, to which the scores of --model in the output folder are added."
    )
    seed: int = option("Seed of bootstrap intervals, folds and t-SNE.", 0)


def main(argv: Sequence[str]) -> dict[str, dict]:
    """Run the unfinished benchmarks, and return the content of each benchmark's result file."""
    from .bundled import BENCHMARKS, get_benchmark

    (args,) = parse(argv, "evaluate", __doc__.replace("{benchmarks}", ", ".join(BENCHMARKS)), (EvaluationArguments,))

    from ..evaluation import (
        Settings,
        finished,
        load_model,
        missing_caption_metrics,
        open_source,
        plan,
        results_in,
        run,
        to_html,
        to_markdown,
    )
    from ..publishing.results import add_results, card_file

    names = [name.strip() for name in args.benchmarks.split(",")]
    places = _places(args.dataset, names, "--dataset")
    train_places = _places(args.train_dataset, names, "--train_dataset")
    benchmarks = [get_benchmark(name, places.get(name)) for name in names]
    for name in ("limit", "batch_size", "num_beams"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.card:
        folder = card_file(args.card).parent
        if Path(args.model).is_dir() and Path(folder, "config.json").exists() and not folder.samefile(args.model):
            raise ValueError(f"--card belongs to the model in '{folder}', not to --model '{args.model}'.")
    models = args.model, args.captioner, args.clip_score_model
    check_output_outside(args.output_dir, *models, *places.values(), *train_places.values())
    device = device_of(args.device)
    scorer = load_model(args.clip_score_model, device=device) if args.clip_score_model else None
    if scorer and not (scorer.embeds and scorer.reads_text):
        raise ValueError(f"--clip_score_model must be a CLIP, but '{args.clip_score_model}' is not one.")
    settings = Settings(
        args.modality,
        args.batch_size,
        args.seed,
        args.num_beams,
        args.word_vectors,
        progress=True,
        probe=args.probe,
        train_modality=args.train_modality,
        clip_scorer=scorer,
    )

    sources = [open_source(benchmark, places.get(benchmark.name), args.limit) for benchmark in benchmarks]
    model = load_model(args.model, args.model_revision, args.dtype, device)
    captioner = load_model(args.captioner, args.captioner_revision, args.dtype, device) if args.captioner else None
    if captioner and (captioner.embeds or not model.embeds):
        raise ValueError("--captioner must be an image-text-to-text model, and --model one that embeds images.")
    plans = [
        plan(benchmark, source, model, captioner, settings, train_places.get(benchmark.name))
        for benchmark, source in zip(benchmarks, sources, strict=True)
    ]
    for name in ("probe", "train_modality"):
        if getattr(args, name) and not any("probe" in planned.tasks for planned in plans):
            raise ValueError(f"--{name} needs a probe: choose a benchmark with classes and add --probe.")
    if scorer and not any("captioning" in planned.tasks for planned in plans):
        raise ValueError("--clip_score_model needs captions: choose a benchmark with captions and a captioner.")
    hold_output_dir(args)
    known = [finished(planned, settings, args.output_dir) for planned in plans]
    if any("captioning" in planned.tasks for planned in plans):
        for metric, remedy in missing_caption_metrics(settings).items():
            logger.warning(f"{metric} will be missing: {remedy}.")

    results, folder = {}, Path(args.output_dir)
    for planned, result in zip(plans, known, strict=True):
        name = planned.benchmark.name
        logger.info(f"{planned.benchmark.title}: {', '.join(planned.tasks)}" + (" (finished)" if result else ""))
        results[name] = result or run(planned, settings, folder)
        write_file(folder / "report.md", to_markdown(results_in(folder)))
        write_file(folder / "report.html", to_html(results_in(folder), folder))
    logger.info(to_markdown(list(results.values())))
    if args.card:
        add_results(args.card, folder, args.model)
    logger.info(f"The results are in {folder}, with a report in report.html.")
    return results


def _places(options: list[str], names: list[str], flag: str) -> dict[str, str]:
    places = {}
    for word in options:
        name, _, place = word.partition("=")
        if name not in names or not place:
            raise ValueError(f"{flag} must be NAME=DATASET with NAME from {names}, got '{word}'.")
        places[name] = place
    return places


if __name__ == "__main__":
    run("evaluate")
