"""`ConversationTrainer`: the Hugging Face Trainer for conversations."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import write_file
from ..training.decoding import digest_of
from ..training.safe_trainer import SafeTrainer

SAMPLE_NAME, SAMPLE_ROWS = "conversations.json", 16
FROZEN_VALUES = 4  # of each weight


class ConversationTrainer(SafeTrainer):
    """
    A `SafeTrainer` for [`Conversations`] with a [`LlavaCollator`], which resumes only with the conversations, images,
    branches and frozen weights it was started with.

    Each checkpoint has digests of some rows, evenly spread over the data set, and of the frozen weights, for
    comparison.
    """

    def _sample(self) -> dict[str, Any]:
        digests = []
        for number in np.linspace(0, len(self.train_dataset) - 1, SAMPLE_ROWS).astype(int).tolist():
            row = self.train_dataset[number]
            modality = row.get("modality") or self.data_collator.modality
            content = [row["messages"], modality, [digest_of(image) for image in row["images"]]]
            digests.append(hashlib.blake2b(json.dumps(content, default=str).encode(), digest_size=8).hexdigest())
        return {"rows": len(self.train_dataset), "digests": digests, "frozen": self._frozen()}

    def _frozen(self) -> str:
        """A digest of the first values of each weight that does not train; new tokens, which are random, come last."""
        digest = hashlib.blake2b(digest_size=8)
        for name, weight in self.model.named_parameters():
            # PEFT keeps the untrained projector, which is random, as `original_module`.
            if not weight.requires_grad and "original_module" not in name:
                digest.update(f"{name} {weight.detach().flatten()[:FROZEN_VALUES].tolist()}".encode())
        return digest.hexdigest()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and output_dir and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR):
            write_file(Path(output_dir, SAMPLE_NAME), json.dumps(self._sample()) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint, SAMPLE_NAME)
        if file.exists():
            theirs, ours = json.loads(file.read_text(encoding="utf-8")), self._sample()
            if theirs.pop("frozen", ours["frozen"]) != ours.pop("frozen"):
                raise ValueError(
                    f"'{resume_from_checkpoint}' was trained with other frozen weights. Resume with the original "
                    "model in the original dtype."
                )
            if theirs != ours:
                raise ValueError(
                    f"'{resume_from_checkpoint}' was trained on other conversations, images or branches. Resume with "
                    "the original data, image column and modality."
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
