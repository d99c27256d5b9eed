"""The card of a data set of synthetic pairs, from its manifest and its rows."""

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from .marker import MARKER, signed
from .provenance import CITATION, PAPER, generator_source, source

TEMPLATE = Path(__file__).with_name("dataset_card.md.jinja")
REAL_IMAGES = {
    "keep": "a copy of the real image that the caption describes",
    "reference": "the path of the real image on the machine that made the shards; the image itself is not included",
}


def dataset_card(repo_id: str, manifest: dict[str, Any], counts: dict[str, int]) -> DatasetCard:
    """
    The card of a data set of synthetic pairs.

    Args:
        repo_id: its id on the Hub.
        manifest: of the folder of shards, see [`generation.shards.read_manifest`].
        counts: rows of the finished shards, see [`generation.hub.count_rows`]: `shards`, `rows`, `images` (real ids),
            `captions`, `truncated`, `nsfw`, `unchecked`.
    """
    settings, captions = manifest["settings"], manifest["source"]
    licence = captions["captions_license"]
    name = repo_id.split("/")[-1]
    texts = source(captions["dataset_name"], captions["dataset_revision"], "dataset", licensed=False)
    generator = generator_source(settings["generator"], settings["generator_revision"])
    data = DatasetCardData(
        license=licence,
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["gmail", "synthetic", "text-to-image", "diffusers"],
        source_datasets=[texts["name"]] if texts["on_hub"] else None,
        pretty_name=name,
        size_categories=_size_category(counts["rows"]),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    where = f"`{texts['name']}`, split `{captions['dataset_split']}`, column `{captions['caption_column']}`"
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        name=name,
        repo_id=repo_id,
        paper=PAPER,
        citation=CITATION,
        counts=counts,
        num_shards=manifest["num_shards"],
        real=REAL_IMAGES.get(settings["real_images"]),
        kept=settings["real_images"] == "keep",
        licence=licence,
        sources=[
            ("captions", where, texts["revision"] or "not recorded", licence or "not recorded"),
            ("generator", f"`{generator['name']}`", generator["revision"], generator["license"] or "not recorded"),
        ],
        settings={
            "Pipeline and scheduler": f"`{settings['pipeline']}`, `{settings['scheduler']}`",
            "Inference steps": settings["num_inference_steps"],
            "Guidance scale": "none" if settings["guidance_scale"] is None else settings["guidance_scale"],
            "Negative prompt": settings["negative_prompt"] or "none",
            "Precision": settings["dtype"],
            "Images per caption": settings["images_per_caption"],
            "Seed": settings["seed"],
            "Stored as": settings["image_format"],
            "Flagged by a safety checker": _safety(settings, counts),
            "Captions longer than the tokenizer takes": counts["truncated"],
            "Fingerprint of all settings": f"`{manifest['fingerprint']}`",
        },
    )
    return DatasetCard(signed(str(card)))


def _safety(settings: dict[str, Any], counts: dict[str, int]) -> str:
    if counts["unchecked"] == counts["rows"]:
        return "the pipeline has no safety checker"
    return "dropped" if settings["safety_policy"] == "drop" else f"{counts['nsfw']}, kept and marked"


def _size_category(rows: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for bound, name in bounds if rows < bound), "10M<n<100M")
