"""Branches on every kind of vision tower, by `attach_branches`: what must hold whatever the architecture."""

import copy
import io
import pickle
import threading

import dill
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from towers import EVERY, NAMES, TOWERS, image_inputs, make, pooled, randomise, tower_of
from transformers import SiglipVisionModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gmail_hf import attach_branches
from gmail_hf.branches.routing import RoutedLinear, gate_of, routed
from gmail_hf.branches.tower import is_adapter_weight


@pytest.fixture(params=TOWERS)
def case(request):
    """A plain tower, the same with trained branches, the whole model that holds it, and the architecture's name."""
    owner = make(request.param)
    plain = copy.deepcopy(tower_of(owner))
    attach_branches(owner)
    tower = tower_of(owner)
    randomise(tower)
    return plain, tower, owner, request.param


def gradients(tower, name):
    tower.train().zero_grad()
    two_routes = pooled(tower, name, modality=NAMES) + pooled(tower, name, modality="gen")
    two_routes.square().sum().backward()
    return {key: parameter.grad for key, parameter in tower.named_parameters() if is_adapter_weight(key)}


@pytest.mark.parametrize("name", TOWERS)
def test_fresh_branches_change_nothing(name):
    owner = make(name)
    plain = copy.deepcopy(tower_of(owner))
    report = attach_branches(owner)
    tower = tower_of(owner)
    assert set(plain.state_dict()) == {key for key in tower.state_dict() if not is_adapter_weight(key)}
    expected = pooled(plain, name)
    for modality in ("real", "gen", NAMES):
        assert torch.equal(pooled(tower, name, modality=modality), expected), modality
    trained = {key for key, parameter in tower.named_parameters() if parameter.requires_grad}
    assert trained == {key for key in tower.state_dict() if is_adapter_weight(key)}
    assert report.parameters == sum(tower.get_parameter(key).numel() for key in trained)
    assert report.layers == sum(isinstance(module, RoutedLinear) for module in tower.modules()) > 0
    assert f"{report.layers} linear layers" in str(report)


def test_real_is_the_base_bit_for_bit(case):
    plain, tower, _, name = case
    expected = pooled(plain, name)
    assert torch.equal(pooled(tower, name), expected)
    assert not torch.allclose(pooled(tower, name, modality="gen"), expected, atol=1e-3)


def test_a_mixed_batch_equals_one_by_one(case):
    plain, tower, _, name = case
    alone = torch.cat([pooled(tower, name, [row], modality=modality) for row, modality in enumerate(NAMES)])
    torch.testing.assert_close(pooled(tower, name, modality=NAMES), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_equals_plain(case, reentrant):
    _, tower, owner, name = case
    expected = gradients(tower, name)
    assert all(grad is not None and grad.any() for grad in expected.values())
    calls = []
    next(module for module in tower.modules() if isinstance(module, RoutedLinear)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    owner.gradient_checkpointing_enable({"use_reentrant": reentrant})  # by the outer model, as the Trainer does
    if reentrant:  # a reentrant checkpoint needs an input with a gradient
        owner.enable_input_require_grads()
        first = next(module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer))
        first.register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(), *args[1:]))
    found = gradients(tower, name)
    assert len(calls) > 2  # it was computed again
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_a_foreign_checkpoint_wrapper_raises(kind):
    tower = make("siglip").vision_model.train()
    attach_branches(tower)
    apply_activation_checkpointing(
        tower,
        lambda module: checkpoint_wrapper(module, checkpoint_impl=kind),
        lambda module: isinstance(module, GradientCheckpointingLayer),
    )
    inputs = image_inputs("siglip", EVERY)
    inputs["pixel_values"].requires_grad_()
    with pytest.raises(RuntimeError, match="outside of its model's forward pass"):
        tower(**inputs, modality="gen").pooler_output.sum().backward()


def test_threads_do_not_share_a_route(case):
    _, tower, _, name = case
    with torch.no_grad():
        expected = {modality: pooled(tower, name, modality=modality) for modality in ("real", "gen")}
    wrong = []

    def work(modality):
        with torch.no_grad():
            for _ in range(15):
                if not torch.equal(pooled(tower, name, modality=modality), expected[modality]):
                    wrong.append(modality)

    threads = [threading.Thread(target=work, args=(modality,)) for modality in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_hidden_states_are_those_of_the_branch(case):
    plain, tower, _, name = case
    if name == "qwen2_5_vl":
        pytest.skip("transformers' Qwen2.5-VL tower has no hidden states to give")
    states = tower(**image_inputs(name, EVERY), output_hidden_states=True, modality="gen").hidden_states
    base = plain(**image_inputs(name, EVERY), output_hidden_states=True).hidden_states
    assert len(states) == len(base) == 3
    assert torch.equal(states[0], base[0]) and not torch.allclose(states[-1], base[-1], atol=1e-3)


def test_autocast_stays_close(case):
    _, tower, _, name = case
    expected = pooled(tower, name, modality=NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        actual = pooled(tower, name, modality=NAMES)
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.1)


def test_a_bfloat16_base_trains_float32_branches():
    owner = make("dinov2").bfloat16()
    attach_branches(owner)
    inputs = {"pixel_values": image_inputs("dinov2", EVERY)["pixel_values"].bfloat16()}
    output = owner(**inputs, modality="gen").pooler_output
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    grads = [parameter.grad for parameter in owner.parameters() if parameter.requires_grad]
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_peft_gives_the_same_branch(case):
    plain, tower, _, name = case
    linears = {key: module for key, module in tower.named_modules() if isinstance(module, RoutedLinear)}
    peft = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=list(linears)))
    weights = {
        f"base_model.model.{key}.lora_{part}.weight": getattr(linear.adapters["gen"], f"lora_{part}")
        for key, linear in linears.items()
        for part in "AB"
    }
    assert not set_peft_model_state_dict(peft, weights).unexpected_keys
    expected = pooled(tower, name, modality="gen")
    torch.testing.assert_close(pooled(peft.eval(), name), expected, atol=1e-5, rtol=1e-5)


# Without Qwen2.5-VL, whose own tower reads lengths from a tensor and does not compile without a graph break.
@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "by_layer"),
    [
        *((name, False) for name in ("clip", "siglip", "dinov2")),
        *((name, True) for name in TOWERS if name != "qwen2_5_vl"),
    ],
)
def test_compiled_equals_eager(name, by_layer):
    owner = make(name)
    attach_branches(owner)
    tower = tower_of(owner)
    randomise(tower)
    routes = {"real": "real", "gen": "gen", "mixed": NAMES}
    torch._dynamo.reset()
    # By layer, each route of each layer counts as a variant.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        expected = {key: pooled(tower, name, modality=modality) for key, modality in routes.items()}
        layers = [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]
        for part in layers if by_layer else [tower]:
            part.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        for key, modality in routes.items():
            torch.testing.assert_close(pooled(tower, name, modality=modality), expected[key], atol=1e-5, rtol=1e-5)


def test_wrong_calls_are_refused(case):
    _, tower, _, name = case
    inputs = image_inputs(name, EVERY)
    with pytest.raises(ValueError, match=r"Unknown modality \['generated'\].*\['real', 'gen'\]"):
        tower(**inputs, modality="generated")
    with pytest.raises(ValueError, match="lists 3 branches for a batch of 4 images"):
        tower(**inputs, modality=["gen"] * 3)
    with pytest.raises(TypeError, match="modalty"):
        tower(**inputs, modalty="gen")
    layer = next(module for module in tower.modules() if isinstance(module, RoutedLinear))
    with pytest.raises(RuntimeError, match="outside of its model's forward pass"):
        layer(torch.zeros(1, layer.in_features))


def test_targets():
    tower = make("siglip").vision_model
    with pytest.raises(ValueError, match=r"\['key'\] match no linear layer.*'fc1', 'fc2', 'k_proj', 'out_proj'"):
        attach_branches(tower, targets=["q_proj", "key"])
    report = attach_branches(tower, rank=2, targets=["q_proj", "fc2"])
    routed = {name for name, module in tower.named_modules() if isinstance(module, RoutedLinear)}
    assert report.layers == 4 and {name.rpartition(".")[-1] for name in routed} == {"q_proj", "fc2"}
    # nn.MultiheadAttention never calls its `out_proj`: an update there would do nothing.
    assert not any(name.startswith("head") for name in routed)
    with pytest.raises(ValueError, match="already has branches"):
        attach_branches(tower)


def test_quantised_layers_are_refused():
    """bitsandbytes gives linear layers another class. A quantised language model next to the tower is no obstacle."""
    linear_4bit = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    owner = make("siglip")
    owner.text_model.encoder.layers[0].mlp.fc1.__class__ = linear_4bit
    assert attach_branches(owner).layers == 12
    owner = make("siglip")
    owner.vision_model.encoder.layers[0].mlp.fc1.__class__ = linear_4bit
    with pytest.raises(ValueError, match=r"bitsandbytes.nn.modules.Linear4bit\), which branches do not support"):
        attach_branches(owner)
    assert type(owner.vision_model) is SiglipVisionModel


def test_the_tower_is_found_or_asked_for():
    with pytest.raises(ValueError, match="has no module 'eyes'"):
        attach_branches(make("clip"), tower="eyes")
    with pytest.raises(ValueError, match="no vision tower"):
        attach_branches(make("clip").text_model)
    assert attach_branches(make("clip")).tower == "vision_model"
    assert attach_branches(make("vit")).tower == ""


def test_pickled_and_loaded(case):
    """By pickle (torch.multiprocessing), dill (`Dataset.map`) and torch; classes made at run time are made again."""
    _, tower, owner, name = case
    expected, file = pooled(tower, name, modality=NAMES), io.BytesIO()
    torch.save(owner, file)
    file.seek(0)
    twins = pickle.loads(pickle.dumps(owner)), dill.loads(dill.dumps(owner)), torch.load(file, weights_only=False)
    for twin in map(tower_of, twins):
        assert type(twin) is type(tower) and type(twin.config) is type(tower.config)
        assert torch.equal(pooled(twin, name, modality=NAMES), expected)


def test_layers_may_be_on_another_device_than_the_images():
    """As with a `device_map` that splits the tower."""
    tower = make("siglip")
    attach_branches(tower)
    layer = next(module for module in tower.modules() if isinstance(module, RoutedLinear)).to("meta")
    tokens = torch.empty(2, 4, layer.in_features, device="meta")
    assert routed(torch.tensor([[1.0], [0.0]]), layer, tokens).device == tokens.device


def test_a_subclass_of_a_class_made_at_run_time_is_copied_as_it_is():
    owner = make("siglip")
    attach_branches(owner)
    tower = tower_of(owner)
    tower.__class__ = type("Mine", (type(tower),), {})
    assert type(copy.deepcopy(tower)) is type(tower)


def test_a_gate_has_one_row_per_row_of_a_layer():
    gate = torch.eye(2)[[0, 0, 0, 0, 1, 1, 1, 1]]  # two images of four patches
    assert torch.equal(gate_of(gate, torch.zeros(8, 5)), gate)
    assert torch.equal(gate_of(gate, torch.zeros(2, 8)), torch.eye(2))  # merged patches
    assert torch.equal(gate_of(gate, torch.zeros(1, 8, 5)), gate[None])  # one sequence
    assert gate_of(torch.eye(2), torch.zeros(2, 3, 5)).shape == (2, 1, 2)  # images of three tokens
    for layer in (torch.zeros(3, 5), torch.zeros(1, 4, 5), torch.zeros(2, 4, 5)):
        with pytest.raises(RuntimeError, match=f"covers 8 rows, but a layer has {len(layer)} rows.*Use a single"):
            gate_of(gate, layer)
