"""
The parts of runner.py, each started as `python parts.py NAME RATES [--tiny]` in its own process.

A part prints one JSON object per measurement. Models have real sizes and random weights, inputs are random.
"""

import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
sys.path.insert(0, str(BENCHMARKS))

import subjects  # noqa: E402
import torch  # noqa: E402
import trainers  # noqa: E402
from bases import BASES, LORA, Tower, gmail_tower, towers_of, two_models  # noqa: E402
from measuring import Clock, Settings, forget_peak, peak_mb, timed  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from training import working_folder  # noqa: E402

import gmail_hf  # noqa: E402


@dataclass
class Part:
    """Settings, the measured rates (operations per second as `FLOP`, bytes per second as `B`), and the output."""

    settings: Settings
    rates: dict[str, float]
    emit: Callable[[dict[str, Any]], None]

    def choose(self, tiny: Any, full: Any) -> Any:
        return tiny if self.settings.quick else full

    @contextmanager
    def line(self, name: str):
        """A line of the summary to fill in. An error inside the block is recorded in it, and the part continues."""
        line: dict[str, Any] = {"name": name}
        torch.compiler.reset()
        gc.collect()
        if self.settings.device == "cuda":
            torch.cuda.empty_cache()
        try:
            yield line
        except Exception as error:
            traceback.print_exc()
            line["failed"] = f"{type(error).__name__}: {error}"[:500]
        self.emit(line)

    def measure(
        self, line: dict[str, Any], call: Callable[[], Any], repeats: int = 5, warm_up: int = 2, **work: Any
    ) -> None:
        """Time `call`; `work` is that of one call, as in `add`."""
        for _ in range(warm_up):
            call()
        forget_peak(self.settings)
        self.add(line, [timed(call, self.settings) for _ in range(repeats)], **work)
        line["peak_mb"] = peak_mb(self.settings)

    def add(
        self,
        line: dict[str, Any],
        seconds: list[float],
        count: float,
        unit: str,
        operations: float | None = None,
        moved: float | None = None,
    ) -> None:
        """
        Add speed and lower bounds of the time to a line.

        Each entry of `seconds` is the time for `count` items of `unit`, with `operations` and bytes `moved`.
        """
        median = statistics.median(seconds)
        line |= {"seconds": median, "spread": [min(seconds), max(seconds)], "speed": count / median, "unit": unit}
        line |= {"operations": operations, "bytes": moved}
        floors = {"floor_operations": (operations, "FLOP"), "floor_bytes": (moved, "B")}
        floors = {key: work / self.rates[rate] for key, (work, rate) in floors.items() if work and rate in self.rates}
        line |= floors | ({"share": max(floors.values()) / median} if floors else {})


def count_operations(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def moved_by_training(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of a step: weights are read forward and backward, gradients and AdamW's state are read and written."""
    return sum(p.numel() * p.element_size() * (2 + 7 * p.requires_grad) for p in parameters)


def rates(part: Part) -> None:
    """The two upper bounds: a product of large random matrices, and a large copy, in bytes read and written."""
    settings = part.settings
    with part.line("environment") as line:
        from gmail_hf.evaluation import environment

        found, commit = environment(BENCHMARKS if shutil.which("git") else None), BENCHMARKS / "gpu/wheels/COMMIT"
        if commit.exists():  # a copied tree has another history or none
            found |= {"git_commit": commit.read_text().strip(), "uncommitted_changes": False}
        line |= {"environment": found, "note": found["machine"]}
    with part.line(f"matrix product, {settings.dtype}") as line:
        size = part.choose(512, 8192)
        a, b = torch.randn(2, size, size, device=settings.device).to(getattr(torch, settings.dtype))
        part.measure(line, lambda: a @ b, 10, 3, count=2 * size**3, unit="FLOP")
        line["rates"] = {"FLOP": line["speed"]}
    with part.line("copy") as line:
        source = torch.randn(part.choose(2**22, 2**30), device=settings.device)
        target = torch.empty_like(source)
        part.measure(line, lambda: target.copy_(source), 10, 3, count=2 * 4 * source.numel(), unit="B")
        line["rates"] = {"B": line["speed"]}


def tests(part: Part) -> None:
    """Run the tests marked `gpu`, or without a GPU their counterparts on the CPU."""
    import pytest

    class Reporter:
        def pytest_runtest_logreport(self, report: Any) -> None:
            line = {"name": report.nodeid.split("::")[-1], "seconds": report.duration}
            if report.failed:
                print(report.longreprtext, file=sys.__stderr__, flush=True)
                part.emit(line | {"failed": report.longreprtext.strip().splitlines()[-1]})
            elif report.skipped:
                part.emit(line | {"skipped": report.longrepr[-1]})
            elif report.when == "call":
                part.emit(line | {"note": "passed"})

    folder, marker = str(BENCHMARKS.parent / "tests/gpu"), "gpu" if part.settings.device == "cuda" else "not gpu"
    code = pytest.main([folder, "-q", "-p", "no:cacheprovider", "--show-capture=no", "-m", marker], [Reporter()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest: {code!r}")


def gmail_clip(part: Part, size: str, compiled: bool = False, **options: Any) -> Tower:
    return gmail_tower(subjects.gmail(size, replace(part.settings, compile=compiled), **LORA), **options)


def two_clips(part: Part, size: str, compiled: bool = False) -> Tower:
    settings = replace(part.settings, compile=compiled)
    return two_models(lambda: subjects.clip(size, settings), trainers.TARGETS, ["visual_projection"])


def measure_step(
    part: Part,
    name: str,
    make: Callable[[], Tower],
    batch: int,
    operations: float | None = None,
    against: dict[str, Any] | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """Measure a step of Eq. 1 and AdamW on images in memory. The `operations` per pair are counted unless given."""
    with part.line(name) as line:
        with torch.device(part.settings.device):
            tower = make()
        images = torch.randn(batch, 3, 224, 224, device=part.settings.device)
        advance = tower.step(images, part.settings)
        line["of_a_pair"] = operations or count_operations(lambda: advance(2)) / 2
        moved = moved_by_training(tower.parameters) + images.numel() * images.element_size()
        work = {"count": batch, "unit": "pairs", "operations": line["of_a_pair"] * batch, "moved": moved}
        part.measure(line, advance, part.choose(2, repeats), 1, **work)
        if against and "speed" in against:
            line["note"] = f"{line['speed'] / against['speed']:.2f} of the speed of: {against['name']}"
            line["note"] += f", {line['peak_mb'] / against['peak_mb']:.2f} of its memory"
    return line


def stage1(part: Part) -> None:
    """ViT-L/14 in stage 1: our step, two CLIPs with PEFT, and the Trainer with loading; then both steps compiled."""
    size, batch = part.choose("narrow", "vit-l-14"), part.choose(4, 256)
    theirs = measure_step(part, "two CLIPs, PEFT on one", lambda: two_clips(part, size), batch)
    name = f"GmailCLIPModel ({size}, batch {batch})"
    ours = measure_step(part, name, lambda: gmail_clip(part, size), batch, against=theirs)
    with part.line("GmailTrainer on JPEGs, loading included") as line, working_folder():
        settings = replace(part.settings, workers=part.choose(0, min(14, os.cpu_count() or 1)))
        seconds = [batch / gmail_trainer(settings, size, batch, part.choose(2, 12))]
        part.add(line, seconds, batch, "pairs", ours.get("operations"), ours.get("bytes"))
    of_a_pair = [line.get("of_a_pair") for line in (ours, theirs)]
    compiled = measure_step(part, f"{name}, compiled", lambda: gmail_clip(part, size, True), batch, of_a_pair[0], ours)
    name = "two CLIPs, PEFT on one, compiled"
    measure_step(part, name, lambda: two_clips(part, size, True), batch, of_a_pair[1], compiled)


def gmail_trainer(settings: Settings, size: str, batch: int, steps: int) -> float:
    """Pairs/s of a short training with the Trainer, without the first step."""
    distinct = min(batch, 32)  # encoding a JPEG takes longer than reading it
    clock = Clock(settings)
    arguments = trainers.hugging_face_arguments(settings, batch, steps)
    with torch.device(settings.device):
        model = subjects.gmail(size, settings, **LORA)
    gmail_hf.GmailTrainer(
        model=model,
        args=gmail_hf.GmailTrainingArguments(**arguments, per_device_eval_batch_size=min(batch, 128)),
        # One epoch, because each batch is loaded by one worker: two batches per epoch would use only two workers.
        train_dataset=subjects.jpeg_pairs(distinct).select([row % distinct for row in range((1 + steps) * batch)]),
        processing_class=subjects.image_processor(),
        callbacks=[trainers.ticking(clock)],
    ).train()
    return batch / clock.seconds()


def bases(part: Part) -> None:
    """A step of stage 1 on other bases, compared with two copies and PEFT on the same layers; Qwen3-VL's tower."""
    batch = part.choose(4, 256)
    for name in BASES:
        with towers_of(name, part.settings) as (ours, two):
            theirs = measure_step(part, f"two of {name}, PEFT on one", two, batch)
            measure_step(part, name, ours, batch, against=theirs)
    measure_step(part, "Qwen3-VL's tower", lambda: qwen3_vl(part), batch)


def qwen3_vl(part: Part) -> Tower:
    """The vision tower of Qwen3-VL with transformers' default sizes, on packed patches with a mean per image."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel

    small = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3VLVisionConfig(**part.choose(small | {"deepstack_visual_indexes": [0]}, {}))
    tower = Qwen3VLVisionModel(config)
    gmail_hf.attach_branches(tower.train(), rank=trainers.RANK, alpha=trainers.ALPHA, tower="")

    def embed(images: torch.Tensor) -> torch.Tensor:
        side = images.shape[-1] // config.patch_size
        patches = images.reshape(len(images) * side**2, -1).repeat(1, config.temporal_patch_size)
        grid = torch.tensor([[1, side, side]] * len(images), device=images.device)
        tokens = tower(patches, grid_thw=grid, modality="gen").pooler_output  # (images * tokens, hidden)
        return normalize(tokens.view(len(images), -1, tokens.shape[-1]).mean(dim=1), dim=-1)

    return Tower(embed, None, list(tower.parameters()))


def vlm(part: Part) -> None:
    """One LoRA step of a LLaVA with LLaVA-1.5's recipe: 16 conversations, rank 128, gradient checkpointing."""
    sizes = {
        "LLaVA-1.5-7B": {"vocab_size": 32064},
        "LLaVA of Llama-3-8B": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128320},
    }
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, text in sizes.items():
        with part.line(f"{name}, LoRA step") as line:
            measure_llava(part, line, part.choose(small | {"vocab_size": 512, "num_key_value_heads": 1}, text))


def measure_llava(part: Part, line: dict[str, Any], text: dict[str, int]) -> None:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlavaConfig

    from gmail_hf.vlm import language_model_lora

    vision = subjects.gmail_config(part.choose("narrow", "vit-l-14")).vision_config
    side = vision.image_size = part.choose(224, 336)
    rows, patches, image = part.choose(2, 16), (side // vision.patch_size) ** 2, text["vocab_size"] - 1
    llava = LlavaConfig(text_config=LlamaConfig(**text), image_token_index=image, image_seq_length=patches)
    config = gmail_hf.GmailLlavaConfig.from_llava_config(llava, vision)
    with torch.device(part.settings.device):
        model = gmail_hf.GmailLlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(model, language_model_lora(part.choose(4, 128), 256)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
        words = torch.randint(3, image, (rows, 64))
        ids = torch.cat([words[:, :8], torch.full((rows, patches), image), words[:, 8:]], dim=1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["labels"][:, :-32] = -100
        batch["pixel_values"] = torch.randn(rows, 3, side, side, dtype=torch.bfloat16)

    def advance(count: int = rows) -> None:
        with subjects.autocast(part.settings):
            outputs = model(**{name: tensor[:count] for name, tensor in batch.items()}, modality="gen")
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # Operations are counted on one conversation without checkpointing, because recomputation is not necessary work,
    # and with eager attention, because PyTorch 2.11 cannot count attention with more heads for queries than for keys.
    llava_model = model.get_base_model()
    llava_model.set_attn_implementation("eager")
    work = {"operations": rows * count_operations(lambda: advance(1)), "moved": moved_by_training(model.parameters())}
    llava_model.set_attn_implementation("sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    part.measure(line, advance, part.choose(1, 3), 1, count=ids.numel(), unit="tokens", **work)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    line["note"] = f"{billions:.2f} billion parameters, {rows} conversations of {ids.shape[1]} tokens"


def generation(part: Part) -> None:
    """Images/s of a bare loop around the pipeline and of `synthesize`: Stable Diffusion v2's architecture, 512 px."""
    import generation as benchmark

    batch, images, steps = part.choose((2, 4, 2), (16, 64, 50))
    with tempfile.TemporaryDirectory() as folder:
        generator = part.choose("digits", f"{folder}/sd2")
        if not part.settings.quick:
            benchmark.random_stable_diffusion_2(part.settings).save_pretrained(generator)
        sides, pipeline = benchmark.bare_and_synthesize(generator, images, batch, folder, num_inference_steps=steps)
        operations = count_operations(lambda: sides["bare"](batch)) / batch  # also warms up
        moved = images // batch * steps * sum(p.numel() * p.element_size() for p in pipeline.unet.parameters())
        for name, run in sides.items():
            with part.line(f"{name}, {images} images of {steps} steps in batches of {batch}") as line:
                forget_peak(part.settings)
                part.add(line, [images / run()], images, "images", operations * images, moved)
                line["peak_mb"] = peak_mb(part.settings)


def caching(part: Part) -> None:
    """Gradient caching: 4,096 pairs in mini-batches of 256, compared with a plain batch of 256."""
    size, batch, mini = part.choose(("narrow", 16, 4), ("vit-l-14", 4096, 256))
    plain = measure_step(part, f"plain batch of {mini} ({size})", lambda: gmail_clip(part, size), mini)
    cached = partial(gmail_clip, part, size, mini_batch_size=mini)
    measure_step(part, f"{batch} in mini-batches of {mini}", cached, batch, plain.get("of_a_pair"), plain, repeats=2)


PARTS = {part.__name__: part for part in (rates, tests, stage1, bases, vlm, generation, caching)}


def main(name: str, measured: str, *options: str) -> None:
    cuda, tiny = torch.cuda.is_available(), "--tiny" in options
    if not cuda and not tiny:
        raise SystemExit("There is no CUDA device. Use --tiny to try the parts on the CPU.")
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # all other output, such as that of pytest, goes to the log
    settings = Settings("cuda" if cuda else "cpu", "bfloat16", quick=tiny)
    PARTS[name](Part(settings, json.loads(measured), lambda line: print(json.dumps(line), file=lines, flush=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])
