"""What the training scripts share."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).with_name("configs")


@dataclass
class PairArguments:
    """Which pairs a script reads, and how many."""

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "Pairs: a Hub id, a folder saved by datasets, parquet files, an imagefolder, or 'digits', which "
            "come along and are generated on first use."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its revision."})
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows."})

    def load(self, split: str, max_samples: int | None, columns: dict[str, str] | None = None) -> Any:
        """The pairs of a split; arguments as of [`gmail_hf.training.loading.load_pairs`]."""
        from gmail_hf.commands.bundled import load_pairs

        return load_pairs(
            self.dataset_name,
            split,
            config_name=self.dataset_config_name,
            revision=self.dataset_revision,
            columns=columns,
            max_samples=max_samples,
        )


def parse_args(
    argv: Sequence[str],
    dataclasses: Sequence[type],
    description: str,
    default_config: str | Path | None = None,
    stages: dict[str, dict[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """
    An instance of each of `dataclasses`: from `--config`, a YAML file of their fields, and then from the command
    line, which wins.

    Args:
        argv: the command line without the script's name.
        dataclasses: as for `transformers.HfArgumentParser`.
        description: printed by `--help`.
        default_config: the file where neither `--config` nor `--dataset_name` is given.
        stages: defaults of other options that each value of the option `stage` brings; file and command line win.

    Raises:
        SystemExit: unknown options, on the command line or in the file.
    """
    import yaml
    from transformers import HfArgumentParser

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--dataset_name")
    first.add_argument("--stage")
    given, _ = first.parse_known_args(argv)
    parser = HfArgumentParser(tuple(dataclasses), description=description)
    parser.add_argument("--config", help="A YAML file of these options.")
    path = given.config or (default_config if given.dataset_name is None else None)
    values = {}
    if path is not None:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
        unknown = sorted(set(values) - {action.dest for action in parser._actions})
        if unknown:
            parser.error(f"{path} has unknown options {unknown}")
    if stages is not None:
        stage = given.stage or values.get("stage") or next(iter(stages))
        if stage not in stages:
            parser.error(f"unknown stage '{stage}'; the stages are {list(stages)}")
        parser.set_defaults(**stages[stage])
    parser.set_defaults(**values)
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    *parsed, _ = parser.parse_args_into_dataclasses(list(argv))
    return tuple(parsed)


def check_trained(name: str) -> None:
    """
    Refuse a [`GmailCLIPModel`] that is neither a folder nor a Hub id.

    Raises:
        FileNotFoundError: with the script that trains one.
    """
    if "/" not in name and not Path(name).exists():
        raise FileNotFoundError(f"There is no '{name}': train a GmailCLIPModel by examples/train_gmail.py first.")


def bytes_of_checkpoints(model: Any, training_args: Any, num_examples: int = 1) -> int:
    """
    What a run will write: the model with two float32 moments of each trained weight, for each checkpoint kept.

    `num_examples` are the rows of an epoch; without it an epoch counts as one step.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    size = model.num_parameters() * model.dtype.itemsize + 2 * trained * 4
    saves = _saves(training_args, num_examples)
    return size * (min(saves, training_args.save_total_limit or saves) + 1)


def _saves(args: Any, num_examples: int) -> int:
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    epoch = max(1, math.ceil(num_examples / batch))  # steps
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * epoch
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch":
        return math.ceil(steps / epoch)
    return math.ceil(steps / args.save_steps if args.save_steps >= 1 else 1 / args.save_steps)
