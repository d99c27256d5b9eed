"""`ClipCapTrainer`: the Hugging Face Trainer, for captions of cached embeddings."""

from typing import Any

from ..safe_trainer import SafeTrainer


class ClipCapTrainer(SafeTrainer):
    """
    `SafeTrainer` that resumes only on the embeddings that it started with.

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
