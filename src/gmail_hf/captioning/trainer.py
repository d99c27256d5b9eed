"""`ClipCapTrainer`: the Hugging Face Trainer, for captions of cached embeddings."""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME


class ClipCapTrainer(Trainer):
    """
    `Trainer` that leaves no pickle of its arguments and resumes only on the embeddings that it started with.

    Give it rows of [`captioned_embeds`] with a [`CaptionCollator`], and `remove_unused_columns=False`.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        projections = self.model.vision_model.visual_projection
        ours = {name: weight.clone() for name, weight in projections.state_dict().items()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        theirs = projections.state_dict()
        if not all(weight.equal(theirs[name]) for name, weight in ours.items()):
            raise ValueError(
                f"'{resume_from_checkpoint}' was trained on the embeddings of another image encoder: resume with the "
                "one it was started with."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / "training_args.json").write_text(json.dumps(self.args.to_sanitized_dict(), indent=2) + "\n")
