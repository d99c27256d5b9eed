"""
Started by test_distributed.py under torchrun or accelerate: computes all cases in one go and writes them to a folder.

    torchrun --nproc-per-node 2 distributed_cases.py OUTPUT CLIP_FOLDER
"""

import json
import sys
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import make_model, make_pairs, make_processor, pair_losses, pixels, tokens
from torch.nn.parallel import DistributedDataParallel
from transformers import set_seed

from gmail_hf import GmailLossConfig, GmailTrainer, GmailTrainingArguments
from gmail_hf.training import embeddings

PAIRS = 8
CASES = {
    "align": ({}, GmailLossConfig()),
    "local": ({}, GmailLossConfig(gather_negatives=False)),
    "symmetric": ({}, GmailLossConfig(symmetric=True, consistency_weight=0.5)),
    "train_real": ({"trainable_modalities": ["real", "gen"]}, GmailLossConfig(symmetric=True)),
    "text": ({"text_lora": True}, GmailLossConfig(gen_text_weight=1.0, real_text_weight=0.5)),
    "tokens": ({}, GmailLossConfig(token_weight=0.5)),
    "token_sets": ({}, GmailLossConfig(token_weight=0.5, token_loss="sliced_wasserstein")),
    "distributions": ({}, GmailLossConfig(recipe="robust", sliced_wasserstein_weight=20.0)),
    "mini_batches": ({"trainable_modalities": ["real", "gen"]}, GmailLossConfig()),
}
OPTIONS = {"mini_batches": {"mini_batch_size": 3}}


def batch_of(rows: slice) -> dict[str, torch.Tensor]:
    """Part of a batch of eight pairs; pairs 0 and 5 share an image, 3 and 4 a caption, whoever holds them."""
    batch = {
        "generated_pixel_values": pixels(PAIRS),
        "real_pixel_values": pixels(PAIRS, seed=1),
        "input_ids": tokens(PAIRS),
        "image_ids": torch.tensor([0, 1, 2, 3, 4, 0, 6, 7]),
        "caption_ids": torch.tensor([0, 1, 2, 3, 3, 5, 6, 7]),
    }
    return {name: tensor[rows] for name, tensor in batch.items()}


def one_step(clip_folder: str, case: str, rows: slice) -> dict[str, torch.Tensor]:
    """Loss and gradient of one step, by names that tell the case."""
    fields, config = CASES[case]
    model = make_model(clip_folder, **fields).train()
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    loss = pair_losses(parallel, batch_of(rows), config, **OPTIONS.get(case, {}))[1]["loss"]
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def train(clip_folder: str, folder: Path, batch_size: int, bad: tuple[int, ...] = ()) -> tuple[dict, list[dict]]:
    """A short training with the Trainer itself, evaluated before and after: weights and logs."""
    args = GmailTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    set_seed(3)
    pairs = make_pairs(24, bad_generated=bad)
    trainer = GmailTrainer(make_model(clip_folder), args, pairs, pairs, make_processor())
    trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    return dict(trainer.model.state_dict()), [*trainer.state.log_history, metrics]


def cache(clip_folder: str, folder: Path, rank: int, world_size: int) -> torch.Tensor:
    embeddings.CACHE_SHARD_ROWS = 4
    datasets.config.HF_DATASETS_CACHE = folder
    barrier = dist.barrier if dist.is_initialized() else None
    arguments = {"rank": rank, "world_size": world_size, "barrier": barrier}
    cached = embeddings.cached_embeds(
        make_pairs(18), "real_image", make_model(clip_folder), make_processor(), **arguments
    )
    embeddings.CACHE_SHARD_ROWS = 8192
    return torch.from_numpy(embeddings.embeds_array(cached))


def main(output: Path, clip_folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    output.mkdir(exist_ok=True)
    tensors = {"cache": cache(clip_folder, output / "cache", rank, world_size)}
    # Of "none", one process has no readable pair at all.
    splits = {
        "even": (slice(0, 4), slice(4, 8)),
        "uneven": (slice(0, 3), slice(3, 8)),
        "none": (slice(0, 8), slice(8, 8)),
    }
    for case in CASES:
        for name, split in splits.items():
            for key, value in one_step(clip_folder, case, split[rank]).items():
                tensors[f"{case}/{name}/{key}"] = value.contiguous()
    weights, log = train(clip_folder, output / "run", batch_size=4)
    tensors |= {f"trained/{name}": value.contiguous().clone() for name, value in weights.items()}
    _, skipping = train(clip_folder, output / "skipping", batch_size=4, bad=(1, 9, 10))
    save_file(tensors, output / f"rank{rank}.safetensors")
    summary = {"world_size": world_size, "log": log, "skipping": skipping}
    (output / f"rank{rank}.json").write_text(json.dumps(summary))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
