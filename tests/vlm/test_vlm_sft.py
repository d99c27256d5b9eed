"""Stage 2 of a vision-language model by TRL's SFTTrainer, generated and real images in one batch."""

import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from tiny import picture

from gmail_hf import from_vlm
from gmail_hf.branches.tower import is_adapter_weight
from gmail_hf.vlm import ModalityCollator

trl = pytest.importorskip("trl")


def conversations() -> Dataset:
    rows = [
        {
            "images": [picture(seed)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"a thing {seed}"}]},
            ],
            "modality": ["gen", "real", None, "gen"][seed],
        }
        for seed in range(4)
    ]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


@pytest.mark.parametrize("empty", [None, []])
def test_rows_without_images_have_no_modality(empty):
    collate = ModalityCollator(lambda rows: {})
    rows = [{"images": [1, 2]}, {"images": empty}, {"images": [1], "modality": "real"}]
    assert collate(rows) == {"modality": ["gen", "gen", "real"]}
    assert collate([{"image": None}, {"image": 1}]) == {"modality": ["gen"]}


def test_sft_trains_the_language_model_on_both_branches(llava_folder, gmail_folder, llava_processor, tmp_path):
    vlm = from_vlm(llava_folder, gmail=gmail_folder)
    tower = {name: weight.clone() for name, weight in vlm.tower.state_dict().items()}
    args = trl.SFTConfig(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=None,
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    collator = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(llava_processor)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    trainer = trl.SFTTrainer(
        vlm,
        args,
        train_dataset=conversations(),
        processing_class=llava_processor,
        data_collator=ModalityCollator(collator),
        peft_config=lora,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["modality"]) == ["gen", "gen", "gen", "real"]
    trainer.model.eval()
    with torch.no_grad():
        expected = vlm(**batch).loss
        real = vlm(**{**batch, "modality": "real"}).loss
        loss = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(loss, expected)
    assert (real - expected).abs() > 1e-5
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("language_model" in name and "lora_" in name for name in changed)
    assert all(torch.equal(weight, tower[name]) for name, weight in vlm.tower.state_dict().items())
    assert not any(is_adapter_weight(name) for name in changed)
