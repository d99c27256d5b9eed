"""Stage 2 of a vision-language model with TRL's SFTTrainer, on questions about digits scenes."""

import json
from pathlib import Path
from typing import Any

SETTINGS = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 200,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "remove_unused_columns": False,
    "max_length": None,
    "bf16": False,
}
LAYERS = r".*text_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
LONGEST_ANSWER = 12  # tokens


def fine_tune(
    output: Path,
    base: str,
    branches: str,
    pairs: Path,
    split: str,
    seed: int,
    modality: str = "gen",
    image_column: str = "generated_image",
    max_steps: int = 150,
    num_asked: int = 400,
) -> None:
    """
    Train LoRA on the language model and the connector on images of one branch, and test on real images.

    Args:
        output: Folder for `eval_results.json`.
        base, branches: Folders of the model and of the branches that stage 1 trained on its tower.
        pairs: Folder of the digits pairs. The model trains on `train` and is tested on `split`.
        seed: Seed of the LoRA weights and the batches.
        modality, image_column: Branch and column of the training images.
        max_steps: Training steps; 0 tests the model without training.
        num_asked: Number of real images to test on.
    """
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoProcessor
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from gmail_hf import from_vlm
    from gmail_hf.commands.bundled import conversations
    from gmail_hf.commands.vlm import ask
    from gmail_hf.vlm import ModalityCollator

    rows = load_from_disk(pairs)
    model, processor = from_vlm(base, gmail=branches), AutoProcessor.from_pretrained(base)
    args = SFTConfig(str(output), seed=seed, max_steps=max_steps, use_cpu=True, **SETTINGS)
    if max_steps:
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS, modules_to_save=["connector"])
        trainer = SFTTrainer(
            model,
            args,
            train_dataset=prompts(conversations(rows["train"], image_column, str(pairs)), processor),
            processing_class=processor,
            data_collator=ModalityCollator(collator, modality),
            peft_config=lora,
        )
        trainer.train()
        model = trainer.model.merge_and_unload()
    output.mkdir(parents=True, exist_ok=True)
    asked = rows[split].select(range(min(num_asked, len(rows[split]))))
    scores = ask(model, processor, conversations(asked, "real_image", str(pairs)), args, LONGEST_ANSWER)
    (output / "eval_results.json").write_text(json.dumps(scores, indent=2) + "\n")


def prompts(examples: Any, processor: Any):
    """Render a [`gmail_hf.vlm.Conversations`] as TRL's prompts and completions."""
    from datasets import Dataset, Features, Image, List, Value

    rows = []
    for example in map(examples.__getitem__, range(len(examples))):
        prompt = processor.apply_chat_template(example["messages"][:-1], add_generation_prompt=True)
        completion = processor.apply_chat_template(example["messages"])[len(prompt) :]
        rows.append({"prompt": prompt, "completion": completion, "images": example["images"]})
    features = Features(prompt=Value("string"), completion=Value("string"), images=List(Image()))
    return Dataset.from_list(rows, features=features)
