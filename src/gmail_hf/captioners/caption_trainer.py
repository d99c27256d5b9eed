"""`CaptionTrainer`: the Hugging Face Trainer for captions and cached embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import write_file
from ..publishing.marker import MARKER, signed
from ..publishing.model_cards import keep_card
from ..publishing.provenance import on_hub
from ..training.safe_trainer import SafeTrainer

SAMPLE_NAME, SAMPLE_ROWS = "image_embeds_sample.safetensors", 64
TOLERANCE = 0.01  # per entry of a unit vector: bfloat16 changes some by 0.003, another branch by 0.3 (digits)


class CaptionTrainer(SafeTrainer):
    """
    A `SafeTrainer` that resumes only with the settings and the embeddings it was started with.

    Each checkpoint has a sample of them, evenly spread over the rows, for comparison.

    Pass rows of [`captioned_embeds`], or only of [`with_caption_rows`], with a [`CaptionCollator`] and
    `remove_unused_columns=False`.
    """

    def _sample(self) -> torch.Tensor:
        numbers = np.linspace(0, len(self.train_dataset) - 1, SAMPLE_ROWS).astype(int).tolist()
        rows = [self.train_dataset[number] for number in numbers]
        if "image_embeds" in rows[0]:
            return torch.from_numpy(np.stack([row["image_embeds"] for row in rows]))
        return self.model.caption_bank.embeds[[row["caption_rows"] for row in rows]].cpu()  # training on text only

    def _vision_sums(self) -> list[float]:
        """A sum for each weight of the image encoder, to recognise another one."""
        return [weight.double().sum().item() for weight in self.model.vision_model.parameters()]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and output_dir and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR):
            save_file({"image_embeds": self._sample()}, Path(output_dir, SAMPLE_NAME))
            keep_card(output_dir, self.hub_model_id, self.args.hub_token)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """
        As in `Trainer`, with the language model as the base if it is on the Hub; a captioner has no name itself. A
        card that a user wrote or edited is kept.
        """
        folder = self.args.output_dir
        if not self.is_world_process_zero() or keep_card(folder, self.hub_model_id, self.args.hub_token):
            return
        base = self.model.config.text_config.name_or_path
        super().create_model_card(*args, **{"finetuned_from": base if on_hub(base) else None, **kwargs})
        card = Path(folder, "README.md")
        nameless = "a fine-tuned version of [](https://huggingface.co/) on"
        text = card.read_text(encoding="utf-8").replace(nameless, "trained on")
        write_file(card, signed(f"{text.rstrip()}\n\n{MARKER}\n"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        theirs, config = PreTrainedConfig.get_config_dict(resume_from_checkpoint)[0], self.model.config
        for field in ("model_type", *config.own_fields()):
            if field not in config.sub_configs and theirs.get(field) != getattr(config, field):
                raise ValueError(
                    f"'{resume_from_checkpoint}' was trained with {field}={theirs.get(field)}, but this model has "
                    f"{getattr(config, field)}. Resume with the original settings."
                )
        file = Path(resume_from_checkpoint, SAMPLE_NAME)
        if not file.exists():
            raise ValueError(
                f"'{resume_from_checkpoint}' lacks {SAMPLE_NAME}, which identifies its embeddings. Start a new run."
            )
        sample, started_with = self._sample(), load_file(file)["image_embeds"]
        if sample.shape != started_with.shape or not sample.allclose(started_with, rtol=0, atol=TOLERANCE):
            raise ValueError(
                f"'{resume_from_checkpoint}' was trained on other embeddings. Resume with the original data, image "
                "column and branch."
            )
        ours = self._vision_sums()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._vision_sums() != ours:
            raise ValueError(
                f"'{resume_from_checkpoint}' was trained on the embeddings of another image encoder. Resume with the "
                "original one."
            )
