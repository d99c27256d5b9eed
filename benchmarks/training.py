"""
Stage 1: a step of `GmailTrainer` beside what people would write or take instead, in time and in memory.

All sides see the same pairs of JPEGs and batches, and train the same LoRA targets by AdamW at the same precision. A
round is one short training of each; its first step is not counted, loading is. Ours embeds the real images before
training (`cache_real_embeds`): that one pass is not in a step, and is told in a line of its own.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import subjects
from measuring import (
    Clock,
    MissingPeer,
    Settings,
    alone,
    forget_peak,
    imports,
    missing,
    peak_mb,
    row,
    take_turns,
    timed,
)

RANK, ALPHA, TEMPERATURE = 4, 8, 0.07
TARGETS = r".*vision_model.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
TWO_CLIPS = "(a) PyTorch: two CLIPs, PEFT on one, real images recomputed"
SENTENCE_TRANSFORMERS = "(b) sentence-transformers, MultipleNegativesRankingLoss"
BARE = "(c) the same tower on tensors in memory, no Trainer, no loading"


def sizes(settings: Settings) -> dict[str, Any]:
    """Model, pairs a step, steps that count and rounds."""
    size = settings.size or settings.choose("vit-b-32", "vit-b-32", "vit-l-14")
    return {
        "size": size,
        "batch": settings.choose(2, 16, 256),
        "steps": settings.choose(2, 2, 20),
        "rounds": settings.choose(2, 3, 3),
    }


def step(settings: Settings) -> Iterator[dict[str, Any]]:
    """images/s of ours by those of each other side."""
    chosen = sizes(settings)
    rounds = chosen.pop("rounds")
    with _folder():
        sides = {"ours": gmail_trainer(settings, **chosen)}
        for name, build in ((TWO_CLIPS, two_clips), (SENTENCE_TRANSFORMERS, sentence_transformers), (BARE, bare_loop)):
            try:
                sides[name] = build(settings, **chosen)
            except MissingPeer as reason:
                yield missing("step", "GmailTrainer, stage 1", name, str(reason))
        speeds = take_turns(sides, rounds)
    ours = speeds.pop("ours")
    note = f"{chosen['size']}, batch {chosen['batch']}"
    for name, theirs in speeds.items():
        aim = ">= 0.95" if name == BARE else ">= 1.5"
        yield row("step", "GmailTrainer, stage 1", name, "pairs/s", ours, theirs, aim, note)
    floor = floor_pairs_per_second(settings, chosen["size"], chosen["batch"])
    yield row(
        "step",
        "GmailTrainer, stage 1",
        "its operations at the rate of its largest product",
        "pairs/s",
        ours,
        [floor] * rounds,
        note=note,
    )


def memory(settings: Settings) -> Iterator[dict[str, Any]]:
    """Peak memory of training, each side in its own process, beyond that of a process with the same imports."""
    chosen = sizes(settings) | {"steps": 1, "batch": settings.choose(4, 24, 256)}
    del chosen["rounds"]
    builders = {"ours": "gmail_trainer", TWO_CLIPS: "two_clips", SENTENCE_TRANSFORMERS: "sentence_transformers"}
    names = list(builders)
    peaks = {name: [] for name in builders}
    for _ in range(settings.choose(1, 2, 2)):
        baseline = alone("measuring:imports", settings)
        for name in names:
            try:
                peaks[name].append(alone("training:peak", settings, builder=builders[name], **chosen) - baseline)
            except MissingPeer as reason:
                yield missing("memory", "GmailTrainer, stage 1", name, str(reason))
                names = [other for other in names if other != name]
    note = f"{chosen['size']}, batch {chosen['batch']}"
    for name in names[1:]:
        aim = "<= 0.6" if name == TWO_CLIPS else None
        yield row("memory", "GmailTrainer, stage 1", name, "MB", peaks["ours"], peaks[name], aim, note)


def peak(settings: Settings, builder: str, **chosen: Any) -> float:
    imports(settings)
    with _folder():
        train = globals()[builder](settings, **chosen)
        forget_peak(settings)  # of making the model
        train()
        return peak_mb(settings)


@contextmanager
def _folder() -> Iterator[None]:
    """A folder for what is written, gone afterwards; cached embeddings among it."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    before = datasets.config.HF_DATASETS_CACHE, os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
        os.chdir(folder)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before[0]
            os.chdir(before[1])


def hugging_face_arguments(settings: Settings, batch: int, steps: int) -> dict[str, Any]:
    """Of a Hugging Face Trainer, ours and sentence-transformers'."""
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


def bare_step(settings: Settings, model: Any, batch: int, mini_batch_size: int | None = None) -> Callable[[], None]:
    """A step on images and partners' embeddings that are in memory already."""
    import torch

    from gmail_hf.losses import GmailLossConfig

    images = subjects.pixels(batch, settings)
    partners = torch.randn(batch, model.projection_dim, device=settings.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    losses = GmailLossConfig(mini_batch_size=mini_batch_size)

    def advance() -> None:
        with subjects.autocast(settings):
            outputs = model(generated_pixel_values=images, real_embeds=partners, loss_config=losses)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return advance


def floor_pairs_per_second(settings: Settings, size: str, batch: int) -> float:
    """Pairs/s if all operations of a step ran at the rate that the product of tokens and fc1's weight has here."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = subjects.gmail(size, settings, lora_rank=RANK, lora_alpha=ALPHA).train()
    few = min(batch, 4)
    with FlopCounterMode(display=False) as counter:
        bare_step(settings, model, few)()
    weight = model.vision_model.encoder.layers[0].mlp.fc1.weight.detach()
    tokens = batch * model.vision_model.embeddings.position_embedding.num_embeddings
    states = torch.randn(tokens, weight.shape[1], device=settings.device)
    dtype = getattr(torch, settings.dtype)
    states, weight = states.to(dtype), weight.to(dtype).t()
    repeats = settings.choose(3, 10, 100)
    states @ weight
    seconds = timed(lambda: [states @ weight for _ in range(repeats)], settings) / repeats
    rate = 2 * states.numel() * weight.shape[1] / seconds
    return rate / (counter.get_total_flops() / few)
