"""GmailTrainingArguments: the paper's defaults, steps and epochs, what is refused, the command line."""

import dataclasses

import pytest
from transformers import HfArgumentParser, TrainingArguments

from gmail_hf import GmailLossConfig, GmailTrainingArguments


def test_defaults_are_the_papers(tmp_path):
    args = GmailTrainingArguments(output_dir=str(tmp_path))
    expected = {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 256,
        "per_device_eval_batch_size": 256,
        "max_steps": 50_000,
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 5},
        "logging_steps": 50,
        "remove_unused_columns": False,
        "max_grad_norm": 1.0,
        "temperature": 0.07,
        "align_weight": 1.0,
        "consistency_weight": 0.0,
        "gen_text_weight": 0.0,
        "real_text_weight": 0.0,
        "symmetric": False,
        "gather_negatives": True,
        "pairing": "caption",
        "contrastive_mini_batch_size": None,
        "cache_real_embeds": True,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.optim.startswith("adamw")


@pytest.mark.parametrize("epochs", [1, 3, 3.0, 0.5])
def test_epochs_switch_the_default_steps_off(tmp_path, epochs):
    args = GmailTrainingArguments(output_dir=str(tmp_path), num_train_epochs=epochs)
    assert (args.max_steps, args.num_train_epochs) == (-1, epochs)


@pytest.mark.parametrize("steps", [7, 50_000])
def test_steps_take_precedence_over_epochs(tmp_path, steps):
    both = GmailTrainingArguments(output_dir=str(tmp_path), num_train_epochs=2, max_steps=steps)
    assert (both.max_steps, both.num_train_epochs) == (steps, 2)
    assert GmailTrainingArguments(output_dir=str(tmp_path), max_steps=steps).max_steps == steps
    assert GmailTrainingArguments(output_dir=str(tmp_path), max_steps=-1).num_train_epochs == 3


def test_steps_given_with_epochs_are_what_is_trained(train):
    trainer = train(max_steps=7, num_train_epochs=1)  # an epoch has 5 steps
    assert trainer.state.global_step == 7


@pytest.mark.parametrize("metric", ["eval_centroid_distance", "text_to_image_median_rank", "loss"])
def test_the_best_distance_is_the_smallest(tmp_path, metric):
    assert GmailTrainingArguments(str(tmp_path), metric_for_best_model=metric).greater_is_better is False
    chosen = GmailTrainingArguments(str(tmp_path), metric_for_best_model=metric, greater_is_better=True)
    assert chosen.greater_is_better
    assert GmailTrainingArguments(str(tmp_path), metric_for_best_model="eval_paired_cosine").greater_is_better


def test_a_schedule_keeps_its_settings(tmp_path):
    kept = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    assert GmailTrainingArguments(output_dir=str(tmp_path), **kept).lr_scheduler_kwargs == {"num_cycles": 2}
    linear = GmailTrainingArguments(output_dir=str(tmp_path), lr_scheduler_type="linear")
    assert not linear.lr_scheduler_kwargs


def test_loss_options_are_declared_once_and_reach_the_command_line(tmp_path):
    own = {field.name for field in dataclasses.fields(GmailTrainingArguments)} - {
        field.name for field in dataclasses.fields(TrainingArguments)
    }
    losses = {field.name: field for field in dataclasses.fields(GmailLossConfig)}
    assert losses.keys() < own and not losses.keys() & GmailTrainingArguments.__dict__["__annotations__"].keys()
    helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(GmailTrainingArguments)}
    assert all(helps[name] for name in own)
    flags = ["--output_dir", str(tmp_path), "--gen_text_weight", "0.5", "--symmetric", "--temperature", "0.1"]
    (args,) = HfArgumentParser(GmailTrainingArguments).parse_args_into_dataclasses(flags)
    assert (args.gen_text_weight, args.symmetric, args.temperature, args.align_weight) == (0.5, True, 0.1, 1.0)


def test_a_recipe_gives_way_to_what_is_given(arguments):
    def losses(**fields):
        args = arguments(**fields)
        return args.align_weight, args.energy_weight

    assert losses() == losses(recipe="paper") == (1.0, 0.0)
    assert losses(recipe="robust") == (0.0, 10.0)
    assert losses(recipe="robust", align_weight=1.0) == (1.0, 10.0)
    assert losses(energy_weight=7.0) == (1.0, 7.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"pairing": "random"}, "pairing.*random"),
        ({"pairing": "none"}, "cannot be used with `align_weight`.*recipe"),
        ({"pairing": "none", "recipe": "robust", "consistency_weight": 1.0}, "cannot be used with `align_weight`"),
        ({"pairing": "none", "recipe": "robust", "cache_real_embeds": False}, "cache_real_embeds"),
        (
            {
                "pairing": "none",
                "recipe": "robust",
                "dataloader_num_workers": 1,
                "dataloader_persistent_workers": True,
            },
            "dataloader_persistent_workers=False",
        ),
        ({"images_per_caption": 0}, "images_per_caption.*between 1 and the batch size of 4"),
        ({"images_per_caption": 5}, "images_per_caption.*got 5"),
        ({"recipe": "best"}, "recipe.*'paper', 'robust'.*best"),
        ({"sliced_wasserstein_projections": 0}, "sliced_wasserstein_projections"),
        ({"sliced_wasserstein_weight": -1.0}, "negative"),
        ({"energy_weight": float("nan")}, "negative"),
        ({"pairing": "optimal", "cache_real_embeds": False}, "cache_real_embeds"),
        ({"pairing": "optimal", "token_weight": 1.0}, "`token_weight=0`"),
        ({"pairing": "optimal", "align_weight": 0.0, "gen_text_weight": 1.0}, "aligns images"),
        ({"on_bad_image": "ignore"}, "on_bad_image.*ignore"),
        ({"temperature": 0.0}, "temperature"),
        ({"align_weight": 0.0}, "weight"),
        ({"contrastive_mini_batch_size": 0}, "mini-batch"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(arguments, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(**fields)
