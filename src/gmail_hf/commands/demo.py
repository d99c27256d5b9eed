"""
Run GMAIL in minutes on two CPU cores, with real handwriting, images of a small diffusion model and held-out scenes.

    gmail-hf demo
    gmail-hf demo --output_dir demo-near --guidance_scale 2 --num_inference_steps 20

It needs pip install "gmail-hf[digits]" and downloads nothing. A tiny latent diffusion model generates one image from
the caption of each real scene of two handwritten digits. GMAIL then trains the gen branch of a tiny CLIP to match the
frozen real branch's embeddings of the real scenes, once with the paper's recipe (Eq. 1) and once with recipe robust.
Probes for the two digits are trained on generated images, both those of the training and others that GMAIL never saw.
They are tested on real scenes whose handwriting the CLIP, the diffusion model and GMAIL never saw.

The output folder gets results.json, results.md, embeddings.png, pairs.png, and in model/ the CLIP trained with recipe
robust and its adapters.

Settings are the paper's except for size and length: its learning rate is meant for 50,000 steps, and this short run
needs a larger one. The generator uses diffusers' default guidance of 7.5 and few steps, as is usual for speed. Its
images then differ from real scenes like a large model's images from photographs. With its best settings (the second
command), there is almost no gap left to close. Learning rate and sampling were chosen on validation scenes (see
benchmarks/README.md), never on the test split shown. The number of steps keeps both recipes to minutes.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import write_file
from .cli import run
from .options import option, parse

RESULTS = """# GMAIL on the digits scenes

The scores are mean accuracies of two probes, one per digit, trained on the row's embeddings and tested on f_r(held-out
real scenes). Gap closed = (row − generated taken for real) / (real − generated taken for real). Unseen probes are
trained on other generated images, which alignment never saw. The last four columns compare held-out pairs.

{table}
{gap}

Settings: {settings}; {seconds} s.
"""


RECIPES = {"GMAIL (Eq. 1)": "paper", "GMAIL, recipe robust": "robust"}


@dataclass
class DemoArguments:
    _argument_group_name = "demo"

    output_dir: str = option("Folder for all output.", "demo")
    seed: int = option("Seed of scenes, generator noise, adapters and batches.", 0)
    num_pairs: int = option("Number of training pairs.", 2000)
    num_unseen: int = option("Number of pairs that train probes, but not GMAIL.", 500)
    num_heldout: int = option("Number of test pairs for measuring alignment.", 400)
    num_test: int = option("Number of real test scenes.", 2000)
    guidance_scale: float = option("Guidance scale of the generator.", 7.5)
    num_inference_steps: int = option("Denoising steps of the generator.", 7)
    max_steps: int = option("Training steps of each recipe.", 150)
    batch_size: int = option("Pairs per training step.", 128)
    learning_rate: float = option("Learning rate.", 2e-3)

    def __post_init__(self) -> None:
        if self.num_heldout > self.num_test:
            raise ValueError("--num_heldout must not be larger than --num_test: they are the first of these scenes.")


def main(argv: Sequence[str]) -> dict:
    """Run all six steps and return the content of results.json."""
    (args,) = parse(argv, "demo", __doc__, (DemoArguments,))
    start, output_dir = time.perf_counter(), Path(args.output_dir)

    import numpy as np
    from transformers import CLIPProcessor, set_seed

    from ..digits import clip_path, generate_pairs, load_digits
    from ..metrics import (
        PairEmbeddings,
        paired_cosine,
        plot_embeddings,
        plot_pairs,
        separability,
        to_markdown,
        train_on_generated,
    )
    from ..models.clip import GmailCLIPModel
    from ..training.embeddings import embed_images
    from ..training.trainer import GmailTrainer, GmailTrainingArguments

    set_seed(args.seed)
    output_dir.mkdir(parents=True, exist_ok=True)

    print("\n[1/6] Generating an image from the caption of each real scene")
    test = load_digits("test", args.num_test, seed=args.seed)
    sampling = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    scenes = load_digits("train", args.num_pairs + args.num_unseen, seed=args.seed)
    generated = generate_pairs(scenes, seed=args.seed, **sampling)
    pairs, unseen = (
        generated.select(range(*rows)) for rows in ((0, args.num_pairs), (args.num_pairs, len(generated)))
    )
    heldout = generate_pairs(test.select(range(args.num_heldout)), seed=args.seed, **sampling)
    sheet = heldout.select(range(min(12, len(heldout))))
    plot_pairs(output_dir / "pairs.png", sheet["real_image"], sheet["generated_image"], sheet["caption"])

    print("\n[2/6] Measuring the gap before alignment")
    processor = CLIPProcessor.from_pretrained(clip_path())
    base = GmailCLIPModel.from_clip(clip_path())

    def embed(images, modality, what, model=base):
        return embed_images(model, processor, images, modality=modality, desc=what)

    test_real = embed(test["real_image"], "real", "f_r(real test scenes)")
    heldout_real = test_real[: len(heldout)]
    heldout_generated = embed(heldout["generated_image"], "real", "f_r(generated, held out)")
    twins = scenes_of_one_caption(test["caption"])
    gap = {
        "paired_cosine_real_real": paired_cosine(test_real[twins[0]], test_real[twins[1]]) if twins[0] else None,
        "paired_cosine_real_generated": paired_cosine(heldout_generated, heldout_real),
        "separability": separability(heldout_generated, heldout_real, seed=args.seed),
    }
    print(describe(gap))

    print("\n[3/6] Training the gen branch; the real branch remains the pretrained CLIP")
    sets = {"generated": pairs, "generated, unseen": unseen, "generated, held out": heldout}
    aligned: dict[str, dict] = {name: {} for name in sets}
    for title, recipe in RECIPES.items():
        print(title)
        set_seed(args.seed)
        model = GmailCLIPModel.from_clip(clip_path(), lora_rank=4)
        trainer = GmailTrainer(
            model=model,
            args=GmailTrainingArguments(
                output_dir=str(output_dir / "model"),
                recipe=recipe,
                max_steps=args.max_steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                logging_steps=max(1, args.max_steps // 4),
                save_strategy="no",
                dataloader_pin_memory=False,
                report_to="none",
                seed=args.seed,
            ),
            train_dataset=pairs,
            processing_class=processor,
        )
        trainer.train()
        model.eval()
        for name, rows in sets.items():
            aligned[name][title] = embed(rows["generated_image"], "gen", f"f_g({name})", model)

    print("\n[4/6] Training probes on generated images, testing them on real ones")

    def pair_embeddings(name):
        generated, real = (
            embed(sets[name][f"{side}_image"], "real", f"f_r({side})") for side in ("generated", "real")
        )
        return PairEmbeddings(generated, real, aligned[name])

    held = aligned["generated, held out"]
    rows = train_on_generated(
        pair_embeddings("generated"),
        digit_labels(np.array(pairs["digits"])),
        PairEmbeddings(heldout_generated, heldout_real, held, np.array(heldout["caption"])),
        test_real,
        digit_labels(np.array(test["digits"])),
        seed=args.seed,
        unseen=pair_embeddings("generated, unseen"),
        unseen_labels=digit_labels(np.array(unseen["digits"])),
    )
    table = to_markdown(rows)
    print(table)

    print("[5/6] Saving, and reloading with PEFT and with pipeline()")
    model_dir = output_dir / "model"
    model.save_pretrained(model_dir)
    processor.save_pretrained(model_dir)
    reload = {
        "peft_max_difference": difference_through_peft(model_dir, model, processor, heldout["generated_image"][:32]),
        "pipeline_max_difference": difference_through_pipeline(model_dir, model, processor, test.select(range(8))),
    }
    through = "PeftModel.from_pretrained(clip, folder, subfolder='gen'): same embeddings"
    print(f"  {through} (largest difference {reload['peft_max_difference']:.1e})")
    through = "pipeline('zero-shot-image-classification', model=folder): same scores"
    print(f"  {through} (largest difference {reload['pipeline_max_difference']:.1e})")

    print("\n[6/6] Plotting the embeddings")
    drawn = (heldout_real, heldout_generated, held[title])
    plot_embeddings(output_dir / "embeddings.png", *drawn, max_points=300, seed=args.seed)
    settings = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    seconds = round(time.perf_counter() - start, 1)
    results = {"settings": settings, "before_alignment": gap, "rows": rows, "reload": reload, "seconds": seconds}
    write_file(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    report = RESULTS.format(table=table, gap=describe(gap), settings=shown, seconds=seconds)
    write_file(output_dir / "results.md", report)
    print(f"\nFinished in {seconds:.0f} s. See embeddings.png, pairs.png and results.md in {output_dir}.")
    return results


def describe(gap: dict[str, float | None]) -> str:
    """Describe the gap before alignment in words."""
    real_real = gap["paired_cosine_real_real"]
    return (
        "Mean cosine of two images with the same caption in the pretrained CLIP: real and real "
        + (f"{real_real:.3f}" if real_real is not None else "– (no caption occurs twice)")
        + f", real and generated {gap['paired_cosine_real_generated']:.3f}. A linear classifier separates generated "
        f"from real images with an accuracy of {gap['separability']:.1%} (chance: 50%)."
    )


def digit_labels(digits):
    """Turn (n, 2) digits into two ten-way tasks."""
    return {"left digit": digits[:, 0], "right digit": digits[:, 1]}


def scenes_of_one_caption(captions: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the rows of the first two scenes of each caption that occurs twice."""
    from ..training.columns import rows_by_caption

    twice = [rows for rows in rows_by_caption(captions).values() if len(rows) > 1]
    return [rows[0] for rows in twice], [rows[1] for rows in twice]


def difference_through_peft(folder, model, processor, images) -> float:
    """Return the largest difference in normalised f_g between our model and PEFT on a plain CLIP."""
    import torch
    from peft import PeftModel
    from transformers import CLIPModel

    from ..digits import clip_path

    peft_model = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_path()), folder, subfolder="gen").eval()
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = peft_model.get_image_features(pixel_values).pooler_output
        ours = model.get_image_features(pixel_values.to(model.device), modality="gen").pooler_output.cpu()
    normalize = torch.nn.functional.normalize
    return (normalize(theirs, dim=-1) - normalize(ours, dim=-1)).abs().max().item()


def difference_through_pipeline(folder, model, processor, scenes) -> float:
    """Return the largest difference in zero-shot scores between our model and a pipeline loaded from its folder."""
    import torch
    from transformers import pipeline

    captions = sorted(set(scenes["caption"]))
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    answers = classify(list(scenes["real_image"]), candidate_labels=captions, hypothesis_template="{}")
    theirs = torch.tensor([[{a["label"]: a["score"] for a in answer}[c] for c in captions] for answer in answers])
    inputs = processor(text=captions, images=list(scenes["real_image"]), return_tensors="pt", padding=True)
    with torch.no_grad():
        ours = model(**inputs.to(model.device), modality="real").logits_per_image.softmax(dim=-1).cpu()
    return (theirs - ours).abs().max().item()


if __name__ == "__main__":
    run("demo")
