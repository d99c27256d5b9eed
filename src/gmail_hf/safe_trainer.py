"""The Hugging Face Trainer without its pickle, and with what a training cost."""

import json
import resource
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

logger = logging.get_logger(__name__)


class SafeTrainer(Trainer):
    """
    `Trainer` that leaves its arguments as training_args.json; its own pickle nobody should have to trust.

    For the same reason it pushes finished models only, by `push_to_hub()`, and no checkpoint on the way, whatever
    `hub_strategy` says.
    """

    def cost(self) -> dict[str, int]:
        """
        What training takes, beside the time that `train` reports (the paper's Table 12).

        Call it after training; in a distributed run, in every process. It takes one more forward and backward pass,
        and no step.

        Returns:
            `trained_parameters` and `parameters`; `flops_per_step`, floating-point operations of one forward and
            backward pass of this process on its first batch, a multiplication and an addition counted as two;
            `peak_memory_bytes` of this process so far, on the GPU if there is one.
        """
        parameters = list(self.model.parameters())
        self.model.train()
        inputs = self._prepare_inputs(next(iter(self.get_train_dataloader())))
        with FlopCounterMode(display=False) as counter, self.compute_loss_context_manager():
            self.compute_loss(self.model_wrapped, inputs).backward()
        self.model.zero_grad()
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:  # in bytes on macOS, elsewhere in kibibytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "flops_per_step": counter.get_total_flops(),
            "peak_memory_bytes": peak,
        }

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        logger.warning_once("Nothing is pushed before the end of training: checkpoints on the way hold pickles.")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            (folder / "training_args.json").write_text(json.dumps(self.args.to_sanitized_dict(), indent=2) + "\n")
