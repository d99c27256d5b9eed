"""
Started by test_leaks.py in the environment of a `HubServer`: pushes from a folder that holds base, pairs and
pipeline too. `python pushes.py FOLDER models | shards | captioners`
"""

import sys
from pathlib import Path

from tiny_pipeline import command_line

TRAINING = {
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "save_steps": 1,
    "eval_split": "train",
    "report_to": "tensorboard",
    "dataloader_pin_memory": False,
    "push_to_hub": True,
    "hub_strategy": "every_save",
}


def models(folder: Path) -> None:
    from tiny import make_clip, make_model, make_pairs, make_processor

    from gmail_hf.commands import cli

    make_clip().save_pretrained(folder / "clip")
    make_processor().save_pretrained(folder / "clip")
    make_pairs(16).to_parquet(folder / "pairs.parquet")
    options = TRAINING | {"dataset": folder / "pairs.parquet", "model": folder / "clip", "output_dir": folder / "run"}
    options |= {"hub_model_id": "org/run", "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    cli.main(["train", *command_line(options)])
    model = make_model(folder / "clip")
    model.push_to_hub("org/whole")
    model.save_pretrained(folder / "saved", push_to_hub=True, repo_id="org/saved")
    make_processor().push_to_hub("org/whole")


def shards(folder: Path) -> None:
    from tiny import make_pairs
    from tiny_pipeline import make_pipeline

    from gmail_hf.commands import cli

    make_pipeline().save_pretrained(folder / "pipeline")
    make_pairs(8).to_parquet(folder / "captions.parquet")
    options = {"dataset": folder / "captions.parquet", "generator": folder / "pipeline", "num_inference_steps": 1}
    options |= {"output_dir": folder / "shards", "push_to_hub": True, "hub_dataset_id": "org/pairs"}
    cli.main(["generate", *command_line(options)])
    cli.main(["push", str(folder / "shards"), "org/pairs"])  # settings there and here are the same


def captioners(folder: Path) -> None:
    from datasets import Image
    from tiny import make_model
    from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, CLIPModel

    from gmail_hf.commands import cli
    from gmail_hf.digits import clip_path, llama_path, load_digits

    for source, name, auto in ((clip_path(), "base", CLIPModel), (llama_path(), "llama", AutoModelForCausalLM)):
        auto.from_pretrained(source).save_pretrained(folder / name)
    make_model(folder / "base").save_pretrained(folder / "gmail")
    AutoProcessor.from_pretrained(clip_path()).save_pretrained(folder / "gmail")
    AutoTokenizer.from_pretrained(llama_path()).save_pretrained(folder / "llama")
    scenes = load_digits("train", 24)
    images = scenes.cast_column("real_image", Image(decode=False))["real_image"]
    scenes.add_column("generated_image", images, feature=Image()).to_parquet(folder / "scenes.parquet")
    options = TRAINING | {"dataset": folder / "scenes.parquet", "model": folder / "gmail", "max_eval_samples": 4}
    options |= {"text_model": folder / "llama", "max_new_tokens": 4}
    for command, metrics in (("caption", ["--caption_metrics", "BLEU@4"]), ("vlm", [])):
        more = {"output_dir": folder / command, "hub_model_id": f"org/{command}"}
        cli.main([command, *command_line(options, **more), *metrics])


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]))
