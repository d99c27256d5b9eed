"""The card of a data set of synthetic pairs, from its manifests and its rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from ..metrics.scores import escaped
from .marker import MARKER, signed
from .provenance import CITATION, PAPER, generator_source, on_hub, source

TEMPLATE = Path(__file__).with_name("dataset_card.md.jinja")


def dataset_card(repo_id: str, manifests: dict[str, dict[str, Any]], counts: dict[str, dict[str, int]]) -> DatasetCard:
    """
    Write the card of a data set of synthetic pairs.

    Args:
        repo_id: id of the data set on the Hub.
        manifests: manifests by split, see [`generation.shards.read_manifest`].
        counts: counts of the finished shards by split, see [`generation.push.count_rows`]: `shards`, `rows`, `images`
            (real ids), `captions`, `truncated`, `nsfw`, `unchecked`.
    """
    licences = {manifest["source"]["captions_license"] for manifest in manifests.values()}
    licence = licences.pop() if len(licences) == 1 else None
    name = repo_id.split("/")[-1]
    captions = [manifest["source"]["dataset_name"] for manifest in manifests.values()]
    rows = [_settings(manifest, counts[split]) for split, manifest in manifests.items()]
    data = DatasetCardData(
        license=licence,
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["gmail", "synthetic", "text-to-image", "diffusers"],
        source_datasets=list(dict.fromkeys(filter(on_hub, captions))) or None,
        pretty_name=name,
        size_categories=_size_category(sum(count["rows"] for count in counts.values())),
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in manifests],
            }
        ],
    )
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        name=name,
        repo_id=repo_id,
        paper=PAPER,
        citation=CITATION,
        counts=counts,
        num_shards={split: manifest["num_shards"] for split, manifest in manifests.items()},
        kept=any(manifest["settings"]["real_images"] == "keep" for manifest in manifests.values()),
        licence=licence,
        sources=_sources(list(manifests.values())),
        settings={row: _of_splits(manifests, [values[row] for values in rows]) for row in rows[0]},
    )
    return DatasetCard(signed(str(card)))


def _sources(manifests: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return rows of kind, source, revision and licence of the captions and generators of all splits."""
    captions, generators = [], []
    for manifest in manifests:
        settings, origin = manifest["settings"], manifest["source"]
        texts = escaped(source(origin["dataset_name"], origin["dataset_revision"], "dataset", licensed=False))
        made = escaped(generator_source(settings["generator"], settings["generator_revision"]))
        origin = escaped(origin)
        where = f"`{texts['name']}`, split `{origin['dataset_split']}`, column `{origin['caption_column']}`"
        licence = origin["captions_license"] or "not recorded"
        captions.append(("captions", where, texts["revision"] or "not recorded", licence))
        generators.append(("generator", f"`{made['name']}`", made["revision"], made["license"] or "not recorded"))
    return list(dict.fromkeys(captions + generators))


def _settings(manifest: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """Return the generation settings of a split."""
    settings = escaped(manifest["settings"])
    return {
        "Pipeline and scheduler": f"`{settings['pipeline']}`, `{settings['scheduler']}`",
        "Inference steps": settings["num_inference_steps"],
        "Guidance scale": "none" if settings["guidance_scale"] is None else settings["guidance_scale"],
        "Negative prompt": settings["negative_prompt"] or "none",
        "Precision": settings["dtype"],
        "Images per caption": settings["images_per_caption"],
        "Seed": settings["seed"],
        "Stored as": settings["image_format"],
        "Flagged by a safety checker": _safety(settings, counts),
        "Captions cut by the tokenizer": counts["truncated"],
        "Fingerprint of all settings": f"`{manifest['fingerprint']}`",
    }


def _of_splits(splits: Iterable[str], values: list[Any]) -> Any:
    """Return the value that all splits share, or a list of each split's value."""
    if len(set(values)) == 1:
        return values[0]
    return ", ".join(f"{value} (`{split}`)" for split, value in zip(splits, values, strict=True))


def _safety(settings: dict[str, Any], counts: dict[str, int]) -> str:
    if counts["unchecked"] == counts["rows"]:
        return "the pipeline has no safety checker"
    return "dropped" if settings["safety_policy"] == "drop" else f"{counts['nsfw']}, kept and marked"


def _size_category(rows: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for bound, name in bounds if rows < bound), "10M<n<100M")
