"""The Hugging Face Trainer without its pickle."""

import json
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME


class SafeTrainer(Trainer):
    """`Trainer` that leaves its arguments as training_args.json; its own pickle nobody should have to trust."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / "training_args.json").write_text(json.dumps(self.args.to_sanitized_dict(), indent=2) + "\n")
