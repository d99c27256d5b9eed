"""The Hugging Face Trainer without pickles, with a report of the cost of training."""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, HubStrategy
from transformers.utils.hub import PushInProgress

from ..files import lock_folder, unlock_folder, write_file
from ..publishing.hub import PICKLES, TRAINING_FILES, public_files
from ..publishing.marker import own_card
from .resuming import SEAL, check_output_dir, checkpoint_folder, delete, rotate, seal


class SafeTrainer(Trainer):
    """
    `Trainer` that saves its arguments as training_args.json instead of a pickle.

    Only one run at a time trains in a folder. Checkpoints are sealed when they are complete, and training resumes only
    from complete ones, see [`resuming`](resuming.py). `save_total_limit` deletes checkpoints in the order of their
    steps.

    `push_to_hub()` and `hub_strategy="every_save"` push the model. They never push the training state, which contains
    pickles, the logs, or paths of this machine, see [`public_files`].

    Raises:
        ValueError: `hub_strategy` is "checkpoint" or "all_checkpoints", `label_smoothing_factor` is set, or weights
            are sharded by FSDP or ZeRO-3.
        FileExistsError: raised by `train` if another process trains in `output_dir`.
        FileNotFoundError: raised by `train` if there is no complete checkpoint to resume from.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any):
        if args and args.push_to_hub and args.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ValueError(
                f"`hub_strategy` '{args.hub_strategy.value}' would push the optimizer's state, which is a pickle. "
                "Use 'every_save' or 'end', which push only the model, and resume from the local checkpoint."
            )
        if args and args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` cannot be used: the Trainer would compare the prediction at each position "
                "with the token there instead of the next one. Leave it at 0."
            )
        super().__init__(model, args, *rest, **kwargs)
        self.save_total_limit = self.args.save_total_limit
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "Saving adapters needs unsharded weights, which no process has under FSDP or ZeRO-3: train with DDP, "
                "or with ZeRO-2, which shards only the optimizer."
            )
        for callback in self.callback_handler.callbacks:
            # An evaluation before training would open a log in the working directory, and training would keep it.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = os.path.join(self.args.output_dir, default_logdir())

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1 and getattr(self.model_wrapped, "_orig_mod", self.model_wrapped) is self.model:
            # After `evaluate`, accelerate takes the model for prepared, and would not wrap it in DDP.
            self.model_wrapped = self.model
            self.model._is_accelerate_prepared = False
        lock = lock_folder(self.args.output_dir) if self.args.should_save else None
        try:
            if resume_from_checkpoint:
                resume_from_checkpoint = check_output_dir(self.args.output_dir, resume_from_checkpoint)
            return super().train(resume_from_checkpoint, *rest, **kwargs)
        finally:
            if lock is not None:
                unlock_folder(lock)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            return super().evaluation_loop(*args, **kwargs)
        # It casts the model, which may be trained or saved afterwards.
        parameters = [(parameter, parameter.data) for parameter in self.model.parameters()]
        buffers = [(module, dict(module._buffers)) for module in self.model.modules()]
        output = super().evaluation_loop(*args, **kwargs)
        for parameter, data in parameters:
            parameter.data = data
        for module, kept in buffers:
            module._buffers.update(kept)
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        # Resumed from the last step: the Trainer would train one more step.
        self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self.state.global_step == getattr(self, "_initial_global_step", None):
            del logs["train_loss"]  # the mean over no step, 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir, limit = self._get_output_dir(trial=trial), self.save_total_limit
        checkpoint = checkpoint_folder(output_dir, self.state.global_step)
        if self.args.should_save:
            delete(checkpoint)  # left by an interrupted run
        self.accelerator.wait_for_everyone()  # each process writes a part
        self.args.save_total_limit = None  # the Trainer would delete by the modification times of files
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(checkpoint)
            rotate(output_dir, self.state.global_step, limit, self.state.best_model_checkpoint)

    def cost(self) -> dict[str, int]:
        """
        The cost of training (the paper's Table 12), except the time, which `train` reports.

        Call it after training, and in every process of a distributed run. It runs one forward and backward pass and
        updates nothing.

        Returns:
            `trained_parameters` and `parameters`; `flops_per_step`, the floating-point operations of one forward and
            backward pass of this process on its first batch (a multiplication and an addition count as two);
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
            import resource  # not on Windows

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "flops_per_step": counter.get_total_flops(),
            "peak_memory_bytes": peak,
        }

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """
        Save the model, write its card and upload them in one commit; arguments as in `Trainer`.

        Args:
            card: arguments of `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        card.setdefault("model_name", self.hub_model_id.split("/")[-1])
        if model_tags := getattr(self.model, "model_tags", None):
            tags = card.get("tags") or []
            card["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *model_tags]))
        self.create_model_card(**card)
        self._finish_current_push()
        return self._upload(commit_message, token, revision, run_as_future=not blocking)

    def _upload(
        self,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        ignored: Iterable[str] = (),
        **options: Any,
    ) -> CommitInfo | Future:
        api, revision = HfApi(token=token or self.args.hub_token), revision or self.args.hub_revision
        if revision and not revision.startswith("refs/pr"):
            api.create_branch(self.hub_model_id, branch=revision, exist_ok=True)
        return api.create_commit(
            self.hub_model_id,
            public_files(self.args.output_dir, [*TRAINING_FILES, *ignored]),
            commit_message=message,
            revision=revision,
            **options,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the model of a checkpoint, unless an earlier push is still running."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Keep a card of the user, here or on the Hub, from which the checkpoint then has it.
        here, there = (own_card(folder) for folder in (self.args.output_dir, checkpoint_folder))
        # Upload copies, because the checkpoint may be deleted during the upload.
        left = shutil.ignore_patterns(*PICKLES, SEAL, *(["README.md"] if here or there else []))
        shutil.copytree(checkpoint_folder, self.args.output_dir, ignore=left, dirs_exist_ok=True)
        job = self._upload(
            f"Training in progress, step {self.state.global_step}",
            ignored=["README.md"] if there and not here else [],
            run_as_future=True,
        )
        self.push_in_progress = PushInProgress([job])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            arguments = self.args.to_sanitized_dict() | {"save_total_limit": self.save_total_limit}
            write_file(folder / "training_args.json", json.dumps(arguments, indent=2) + "\n")
