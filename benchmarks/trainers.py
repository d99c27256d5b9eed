"""The sides of `training.py`: functions that train for a few steps and return pairs/s, without the first step."""

import tempfile
from collections.abc import Callable
from typing import Any

import subjects
from measuring import Clock, MissingPeer, Settings

RANK, ALPHA, TEMPERATURE = 4, 8, 0.07
TARGETS = r".*vision_model.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


def hugging_face_arguments(settings: Settings, batch: int, steps: int) -> dict[str, Any]:
    """Arguments for our Trainer and that of sentence-transformers."""
    return {
        "output_dir": "run",
        "max_steps": 1 + steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-4,
        "bf16": settings.dtype == "bfloat16",
        "use_cpu": settings.device == "cpu",
        "dataloader_num_workers": settings.workers,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def ticking(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Ticking(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    return Ticking()


def gmail_trainer(settings: Settings, size: str, batch: int, steps: int) -> Callable[[], float]:
    from gmail_hf import GmailTrainer, GmailTrainingArguments

    model = subjects.gmail(size, settings, lora_rank=RANK, lora_alpha=ALPHA)
    pairs, processor = subjects.jpeg_pairs(2 * batch), subjects.image_processor()

    def train() -> float:
        clock = Clock(settings)
        args = GmailTrainingArguments(
            **hugging_face_arguments(settings, batch, steps), per_device_eval_batch_size=min(batch, 64)
        )
        trainer = GmailTrainer(
            model=model, args=args, train_dataset=pairs, processing_class=processor, callbacks=[ticking(clock)]
        )
        trainer.train()
        return batch / clock.seconds()

    return train


def two_clips(settings: Settings, size: str, batch: int, steps: int) -> Callable[[], float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy, normalize

    real = subjects.clip(size, settings).requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, modules_to_save=["visual_projection"])
    generated = get_peft_model(subjects.clip(size, settings), lora).train()
    parameters = [parameter for parameter in generated.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    pairs, processor = subjects.jpeg_pairs(2 * batch), subjects.image_processor()

    def collate(rows: list[dict]) -> list[torch.Tensor]:
        columns = ("generated_image", "real_image")
        return [processor(images=[row[c] for row in rows], return_tensors="pt")["pixel_values"] for c in columns]

    def embed(model: Any, images: torch.Tensor) -> torch.Tensor:
        return normalize(model.get_image_features(images.to(settings.device)).pooler_output, dim=-1)

    def train() -> float:
        clock = Clock(settings)
        loader = torch.utils.data.DataLoader(
            pairs,
            batch,
            shuffle=True,
            drop_last=True,
            collate_fn=collate,
            num_workers=settings.workers,
            pin_memory=settings.device == "cuda",
        )
        while len(clock.ticks) < 1 + steps:
            for generated_images, real_images in loader:
                with subjects.autocast(settings):
                    with torch.no_grad():
                        real_embeds = embed(real, real_images)
                    logits = embed(generated, generated_images) @ real_embeds.t() / TEMPERATURE
                    loss = cross_entropy(logits.float(), torch.arange(batch, device=logits.device))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                clock.tick()
                if len(clock.ticks) == 1 + steps:
                    break
        return batch / clock.seconds()

    return train


def sentence_transformers(settings: Settings, size: str, batch: int, steps: int) -> Callable[[], float]:
    try:
        from sentence_transformers import (
            SentenceTransformer,
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    except ImportError as error:
        raise MissingPeer(f'{error}: `pip install "gmail-hf[benchmarks]"`') from error
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import CLIPProcessor

    with tempfile.TemporaryDirectory() as folder:
        subjects.clip(size, settings).save_pretrained(folder)
        CLIPProcessor(subjects.image_processor(), subjects.tokenizer()).save_pretrained(folder)
        model = SentenceTransformer(folder, device=settings.device)
    subjects.compile_layers(model, settings)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS), model.transformers_model)
    pairs = subjects.jpeg_pairs(2 * batch).select_columns(["generated_image", "real_image"])

    def train() -> float:
        clock = Clock(settings)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(**hugging_face_arguments(settings, batch, steps)),
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
            callbacks=[ticking(clock)],
        )
        trainer.train()
        return batch / clock.seconds()

    return train


def bare_loop(settings: Settings, size: str, batch: int, steps: int) -> Callable[[], float]:
    model = subjects.gmail(size, settings, lora_rank=RANK, lora_alpha=ALPHA).train()
    advance = bare_step(settings, model, batch)

    def train() -> float:
        clock = Clock(settings)
        for _ in range(1 + steps):
            advance()
            clock.tick()
        return batch / clock.seconds()

    return train


def bare_step(
    settings: Settings, model: Any, batch: int, mini_batch_size: int | None = None, eight_bit: bool = False
) -> Callable[[], None]:
    """A step on generated images in memory, as pixel values or in 8 bits as in `GmailTrainer`, and real embeddings."""
    import torch

    from gmail_hf.training.losses import gmail_loss

    images = subjects.eight_bit_pixels(batch, settings) if eight_bit else {}
    images = images or {"generated_pixel_values": subjects.pixels(batch, settings)}
    partners = torch.nn.functional.normalize(torch.randn(batch, model.projection_dim, device=settings.device), dim=-1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)

    def advance() -> None:
        with subjects.autocast(settings):
            outputs = model(**images, mini_batch_size=mini_batch_size)
            loss = gmail_loss({"gen_embeds": outputs.gen_embeds, "real_embeds": partners})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return advance
