"""Cards for what goes to the Hub, from what was made and measured and nothing else."""

from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

PAPER = "https://arxiv.org/abs/2602.15368"
CITATION = """@inproceedings{mo2025gmail,
  title     = {{GMAIL}: Generative Modality Alignment for generated Image Learning},
  author    = {Mo, Shentong and Yun, Sukmin},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  year      = {2025},
  url       = {https://arxiv.org/abs/2602.15368}
}"""
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
    settings, source = manifest["settings"], manifest["source"]
    licence = source["captions_license"]
    data = DatasetCardData(
        license=licence,
        task_categories=["image-to-text", "zero-shot-image-classification"],
        tags=["gmail", "synthetic", "text-to-image", "diffusers"],
        pretty_name=repo_id.split("/")[-1],
        size_categories=_size_category(counts["rows"]),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    )
    complete = counts["shards"] == manifest["num_shards"]
    rest = "." if complete else "; the rest is not made or not uploaded yet."
    rows = {
        "Generator": f"`{settings['generator']}`, revision `{settings['generator_revision']}`",
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
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    revision = f", revision `{source['dataset_revision']}`" if source["dataset_revision"] else ""
    real = REAL_IMAGES.get(settings["real_images"])
    text = f"""
# {repo_id.split("/")[-1]}

**The images in `generated_image` are synthetic.** A diffusion model made each of them from a caption, to train
vision-language models on generated images by [GMAIL]({PAPER}). They show nothing that happened.

{counts["rows"]} generated images of {counts["captions"]} captions and {counts["images"]} image ids, in
{counts["shards"]} of {manifest["num_shards"]} shards{rest}

```python
from datasets import load_dataset

pairs = load_dataset("{repo_id}", split="train")
```

## Columns

- `generated_image`: the synthetic image, `height` x `width` pixels.
{f"- `real_image`: {real}." if real else "- There is no `real_image`: join your own by `image_id` to align branches."}
- `caption`, `image_id`, `caption_id`: the text, the real image it belongs to, and the caption's own id.
- `index`, `seed`: which image of the caption, and its random seed.
- `generator`, `generator_revision`, `scheduler`, `num_inference_steps`, `guidance_scale`, `negative_prompt`, `dtype`,
  `batch_size`, `gmail_hf_version`: how it was made.
- `truncated`: the tokenizer cut the caption. `nsfw`: the safety checker's verdict, empty where there is none.

## How it was made

| setting | value |
|---|---|
{table}

## Captions

From `{source["dataset_name"]}`{revision}, split `{source["dataset_split"]}`, column `{source["caption_column"]}`.
Licence: {licence or "not stated by whoever made this data set; look it up at the source before you use it"}.

## Uses

For training and studying models that tell generated from real images, with the branches of GMAIL kept apart: generated
images go through the `gen` branch. Not for evaluation in place of photographs, not as evidence of anything, and not
free of what the generator learned: its biases, its mistakes about the caption, its artefacts. Nobody has looked at
every image.

## Citation

```bibtex
{CITATION}
```
"""
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _safety(settings: dict[str, Any], counts: dict[str, int]) -> str:
    if counts["unchecked"] == counts["rows"]:
        return "the pipeline has no safety checker"
    return "dropped" if settings["safety_policy"] == "drop" else f"{counts['nsfw']}, kept and marked"


def _size_category(rows: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for bound, name in bounds if rows < bound), "10M<n<100M")
