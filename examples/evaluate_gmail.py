"""
Score a model on the paper's benchmarks, and on the embedded default.

The embedded default, in minutes and without a download (needs `pip install "gmail-hf[digits,captioning]"`, and for the
scores of captions Java):

    accelerate launch examples/train_gmail.py
    accelerate launch examples/train_clipcap.py
    python examples/evaluate_gmail.py --model gmail-digits --captioner clipcap-digits --benchmarks digits \\
        --output_dir gmail-digits-scores

Benchmarks from the Hub, streamed, or the first rows of one:

    python examples/evaluate_gmail.py --model org/gmail-coco --benchmarks coco,flickr30k,dtd,cars \\
        --output_dir gmail-coco-scores
    python examples/evaluate_gmail.py --model openai/clip-vit-base-patch32 --benchmarks dtd --limit 500 \\
        --output_dir clip-scores

Captions and questions are for image-text-to-text models: any that transformers loads, a ClipCap or LLaVA among them.

    python examples/evaluate_gmail.py --model llava-coco --benchmarks scienceqa,mmmu,coco --dtype bfloat16 \\
        --output_dir llava-coco-scores

`--dataset NAME=PLACE` takes a benchmark's data from elsewhere, a folder, a parquet file or another Hub id of the same
layout: a clone of clip-benchmark/wds_vtab-dtd, or, for coco and flickr30k, pairs with generated images, on which
alignment is measured as well.

The benchmarks are {benchmarks}. Settings come from `--config`, a YAML file of the
options below, and then from the command line, which wins. The output folder gets NAME.json for each benchmark, and
report.md and report.html of all that it holds; a benchmark whose file is there is not run again. `--card gmail-digits`
puts the scores into the model card of that folder, text and metadata.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from _common import parse_args

logger = logging.getLogger("gmail_hf")


@dataclass
class EvaluationArguments:
    model: str = field(
        metadata={"help": "A GmailCLIPModel, a CLIP, or an image-text-to-text model, by Hub id or folder."}
    )
    benchmarks: str = field(metadata={"help": "Names, with commas between them; see above."})
    output_dir: str = field(metadata={"help": "The folder for results and report."})
    revision: str | None = field(default=None, metadata={"help": "The model's revision on the Hub."})
    captioner: str | None = field(
        default=None, metadata={"help": "Beside a CLIP: an image-text-to-text model for captions and questions."}
    )
    captioner_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    modality: str = field(default="real", metadata={"help": "The branch that photographs go through, real or gen."})
    dataset: list[str] = field(default_factory=list, metadata={"help": "NAME=PLACE, see above; any number of them."})
    limit: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows."})
    batch_size: int = field(default=64, metadata={"help": "Images or texts a forward pass."})
    num_beams: int = field(default=5, metadata={"help": "Beams of the search for a caption."})
    word_vectors: str | None = field(
        default=None, metadata={"help": "For WMD of captions: a file in word2vec's format, such as GoogleNews'."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "Where to run; the GPU if there is one."})
    card: str | None = field(
        default=None, metadata={"help": "A model card, or its folder, that gets all scores in the output folder."}
    )
    seed: int = field(default=0, metadata={"help": "Of bootstrap intervals, folds and t-SNE."})


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Run the benchmarks that are not finished; return the content of each one's result file."""
    from gmail_hf.commands.bundled import BENCHMARKS, get_benchmark

    description = __doc__.replace("{benchmarks}", ", ".join(BENCHMARKS))
    (args,) = parse_args(sys.argv[1:] if argv is None else argv, (EvaluationArguments,), description)

    import torch

    from gmail_hf.evaluation import (
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
    from gmail_hf.publishing.results import add_results, card_file

    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    benchmarks = [get_benchmark(name.strip()) for name in args.benchmarks.split(",")]
    places = _places(args.dataset, [benchmark.name for benchmark in benchmarks])
    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is float32, bfloat16 or float16, not '{args.dtype}'.")
    for name in ("limit", "batch_size", "num_beams"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is at least 1, not {getattr(args, name)}.")
    if args.card:
        folder = card_file(args.card).parent
        if Path(args.model).is_dir() and Path(folder, "config.json").exists() and not folder.samefile(args.model):
            raise ValueError(f"--card is that of another model, '{folder}', than --model '{args.model}'.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(args.modality, args.batch_size, args.seed, args.num_beams, args.word_vectors, progress=True)

    sources = [open_source(benchmark, places.get(benchmark.name), args.limit) for benchmark in benchmarks]
    model = load_model(args.model, args.revision, args.dtype, device)
    captioner = load_model(args.captioner, args.captioner_revision, args.dtype, device) if args.captioner else None
    if captioner and (captioner.embeds or not model.embeds):
        raise ValueError("--captioner is an image-text-to-text model beside a --model that is a CLIP.")
    plans = [plan(*pair, model, captioner, settings) for pair in zip(benchmarks, sources, strict=True)]
    known = [finished(planned, settings, args.output_dir) for planned in plans]
    if any("captioning" in planned.tasks for planned in plans):
        for metric, remedy in missing_caption_metrics(settings).items():
            logger.warning(f"{metric} will be missing: {remedy}.")

    results, folder = {}, Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for planned, result in zip(plans, known, strict=True):
        name = planned.benchmark.name
        logger.info(f"{planned.benchmark.title}: {', '.join(planned.tasks)}" + (" (finished)" if result else ""))
        results[name] = result or run(planned, settings, folder)
        (folder / "report.md").write_text(to_markdown(results_in(folder)), encoding="utf-8")
        (folder / "report.html").write_text(to_html(results_in(folder), folder), encoding="utf-8")
    logger.info(to_markdown(list(results.values())))
    if args.card:
        add_results(args.card, folder)
    logger.info(f"The results are in {folder}; look at report.html there.")
    return results


def _places(options: list[str], names: list[str]) -> dict[str, str]:
    places = {}
    for option in options:
        name, _, place = option.partition("=")
        if name not in names or not place:
            raise ValueError(f"--dataset takes NAME=PLACE, NAME out of {names}, not '{option}'.")
        places[name] = place
    return places


if __name__ == "__main__":
    main()
