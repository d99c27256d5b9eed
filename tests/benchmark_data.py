"""Data sets of a few rows in the layouts of those on the Hub, and the models that are scored on them."""

import io
import tarfile
from pathlib import Path

import torch
from PIL import Image as PILImage
from tiny import picture, randomise
from transformers import AutoProcessor, AutoTokenizer

from gmail_hf import ClipCapForConditionalGeneration, ClipCapProcessor, GmailCLIPModel
from gmail_hf.digits import clip_path, llama_path
from gmail_hf.vlm import GmailLlavaForConditionalGeneration, build_processor

CLASS_NAMES = ("cat", "dog", "bird")
TEMPLATES = ("a photo of a {c}.", "the {c}")


def webp(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def write_webdataset(folder: Path, samples: list[dict[str, bytes]], split: str = "test", shards: int = 2) -> Path:
    """`split/0.tar`, ..., the files of each sample beside each other, as in clip-benchmark/wds_*."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    size = -(-len(samples) // shards)
    for shard in range(shards):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
            for number in range(shard * size, min((shard + 1) * size, len(samples))):
                for extension, content in samples[number].items():
                    info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    return folder


def write_classes(folder: Path, labels=(0, 1, 2, 0, 1, 0)) -> Path:
    """Noise images 0, 1, ... of these classes, with class names and templates."""
    samples = [{"webp": webp(seed), "cls": str(label).encode()} for seed, label in enumerate(labels)]
    write_webdataset(folder, samples)
    write_webdataset(folder, samples[:1], "train", shards=1)
    (folder / "classnames.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder


def write_captions(folder: Path, captions: list[list[str]]) -> Path:
    """Noise images 0, 1, ... with these captions, one a line."""
    samples = [{"webp": webp(seed), "txt": "\n".join(lines).encode()} for seed, lines in enumerate(captions)]
    write_webdataset(folder, samples)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def save_gmail(folder: Path, **fields) -> str:
    """The digits CLIP with branches that differ."""
    torch.manual_seed(0)
    model = GmailCLIPModel.from_clip(clip_path(), lora_rank=2, **fields)
    randomise(model, std=0.05).save_pretrained(folder)
    AutoProcessor.from_pretrained(clip_path()).save_pretrained(folder)
    return str(folder)


def save_clipcap(folder: Path, gmail: str) -> str:
    """An untrained ClipCap on it."""
    torch.manual_seed(0)
    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(gmail, llama_path(), prefix_length=3)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(llama_path())
    ClipCapProcessor(AutoProcessor.from_pretrained(gmail).image_processor, tokenizer).save_pretrained(folder)
    return str(folder)


def save_llava(folder: Path, gmail: str) -> str:
    """An untrained projector between it and the digits language model."""
    torch.manual_seed(0)
    processor = build_processor(gmail, llama_path())
    model = GmailLlavaForConditionalGeneration.from_vision_text_pretrained(gmail, llama_path(), processor)
    with torch.no_grad():  # the initial weights are too small to tell images apart
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def png_cell(image: PILImage.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def question(seed: int, **fields) -> dict:
    """A row of ScienceQA about noise image `seed`, or with `blind` about none."""
    return {
        "image": None if fields.pop("blind", False) else png_cell(picture(seed)),
        "question": f"Which letter has number {seed}?", "choices": ["one", "two", "three"], "answer": seed % 3,
        "hint": "", "subject": "natural science", "grade": "grade2", **fields,
    }  # fmt: skip
