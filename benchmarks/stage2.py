"""
Stage 2: an epoch of ClipCap on cached embeddings next to a loop that embeds the images again in every epoch.

Both train the same mapping network and language model on the same captions and batches with AdamW. The loop is that of
ClipCap (Mokady et al., 2021: forward, cross-entropy, AdamW, linear decay) with CLIP in front of it. The gain depends
on
the cost of the language model, which both sides pay: a fine-tuned GPT-2 or the small bundled Llama. The first epoch of
ours, which fills the cache, takes about as long as each epoch of the loop.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import subjects
import trainers
from measuring import Clock, Settings, row, take_turns


def stage2(settings: Settings) -> Iterator[dict[str, Any]]:
    """Captions/s after the first epoch."""
    import datasets

    datasets.disable_progress_bars()
    size = settings.size or settings.choose("vit-b-32", "vit-l-14", "vit-l-14")
    batch = settings.choose(2, 8, 40)  # 40 is ClipCap's; with small batches, AdamW takes a larger share of the time
    for name in ("digits' Llama", "GPT-2"):
        if settings.quick and name == "GPT-2":
            continue  # 124 million parameters
        config, words = language_model(name)
        with tempfile.TemporaryDirectory() as folder:
            sides = {
                "ours": cached_epoch(settings, config, words, size, batch, folder),
                "theirs": recomputing_epoch(settings, config, words, size, batch),
            }
            speeds = take_turns(sides, settings.choose(2, 3, 3))
        note = f"{size}, batch {batch}"
        against = "a loop with CLIP in front"
        yield row("stage2", f"ClipCap, {name}", against, "captions/s", speeds["ours"], speeds["theirs"], ">= 20", note)


def language_model(name: str) -> tuple[Any, Any]:
    """A configuration, and a tokenizer with a vocabulary that fits it."""
    from transformers import AutoConfig, AutoTokenizer, GPT2Config

    from gmail_hf.digits import llama_path

    config = GPT2Config() if name == "GPT-2" else AutoConfig.from_pretrained(llama_path())
    return config, AutoTokenizer.from_pretrained(llama_path())


def captioner(settings: Settings, config: Any, size: str) -> Any:
    import torch

    from gmail_hf.captioners import ClipCapConfig, ClipCapForConditionalGeneration

    torch.manual_seed(0)
    vision = subjects.gmail_config("narrow").vision_config.to_dict()  # its encoder is not used
    vision["projection_dim"] = subjects.SIZES[size][2]
    return ClipCapForConditionalGeneration(ClipCapConfig(vision_config=vision, text_config=config)).to(settings.device)


def cached_epoch(
    settings: Settings, config: Any, words: Any, size: str, batch: int, folder: str
) -> Callable[[], float]:
    """`CaptionTrainer` on rows in the format of [`cached_embeds`] with random embeddings."""
    import numpy as np
    from datasets import Dataset, Features, List, Value
    from transformers import TrainingArguments

    from gmail_hf.captioners import CaptionCollator, CaptionTrainer, captioned_embeds

    pairs = subjects.jpeg_pairs(2 * batch).map(caption)
    dim = subjects.SIZES[size][2]
    rows = np.random.default_rng(0).standard_normal((len(pairs), dim), dtype=np.float32)
    embeds = Dataset.from_dict(
        {"image_embeds": rows}, features=Features(image_embeds=List(Value("float32"), length=dim))
    )
    dataset = captioned_embeds(pairs, embeds)
    model = captioner(settings, config, size)

    def train() -> float:
        clock = Clock(settings)
        arguments = trainers.hugging_face_arguments(settings, batch, settings.choose(3, 6, 50))
        args = TrainingArguments(**arguments | {"output_dir": folder, "remove_unused_columns": False})
        CaptionTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=CaptionCollator(words),
            callbacks=[trainers.ticking(clock)],
        ).train()
        return batch / clock.seconds()

    return train


def recomputing_epoch(settings: Settings, config: Any, words: Any, size: str, batch: int) -> Callable[[], float]:
    import torch
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup

    from gmail_hf.captioners import CaptionCollator

    encoder, model = subjects.clip(size, settings), captioner(settings, config, size).train()
    pairs, processor = subjects.jpeg_pairs(2 * batch).map(caption), subjects.image_processor()
    steps = settings.choose(2, 2, 50)
    tokens = CaptionCollator(words)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = processor(images=[row["generated_image"] for row in rows], return_tensors="pt")["pixel_values"]
        return tokens([row | {"image_embeds": [0.0]} for row in rows]) | {"image_embeds": images}

    def train() -> float:
        clock = Clock(settings)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, 1 + steps)
        loader = DataLoader(
            pairs, batch, shuffle=True, drop_last=True, collate_fn=collate, num_workers=settings.workers
        )
        while len(clock.ticks) < 1 + steps:
            for inputs in loader:
                inputs = {name: tensor.to(settings.device) for name, tensor in inputs.items()}
                with subjects.autocast(settings):
                    with torch.no_grad():
                        inputs["image_embeds"] = encoder.get_image_features(inputs["image_embeds"]).pooler_output
                    loss = model(**inputs).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                clock.tick()
        return batch / clock.seconds()

    return train


def caption(row: dict[str, Any]) -> dict[str, str]:
    """A caption about as long as COCO's, with words that the bundled tokenizer knows."""
    return {"caption": f"a red three near a small blue seven {row['image_id'] % 10}"}
