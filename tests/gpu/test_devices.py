"""
What a GPU computes, compared with float32 on the CPU. The same tests run on the CPU, so that only the device differs.

    python -m pytest -m gpu    # on CUDA; without it they are skipped
"""

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import make_clip, make_model, make_pairs, make_processor, pixels
from tiny_pipeline import make_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from gmail_hf import GmailTrainer, GmailTrainingArguments, alignment_loss
from gmail_hf.generation import SynthesisArguments, synthesize
from gmail_hf.training.distributed import _AllGather

MIXED = ["real", "gen", "gen", "real"]
# Of the norm of a gradient; of that of embeddings a quarter. The other branch's embeddings are off by more than half.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """Heads of 64 channels, as in CLIP, which kernels of attention are made for; 17 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    make_clip(hidden_size=128, intermediate_size=192, patch_size=4).save_pretrained(folder)
    return folder


def step(model, device, dtype=torch.float32, modality="gen", **options) -> dict[str, torch.Tensor]:
    """Embeddings and gradients of one step of Eq. 1 under autocast, on the CPU in float32."""
    model = model.to(device).train()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        embeds = model.embed_images(pixels(4).to(device), modality, **options)
        real = model.embed_images(pixels(4, seed=1).to(device), "real").detach()
        loss = alignment_loss(embeds.float(), real.float(), temperature=0.5)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().float().cpu() for name, tensor in {"embeds": embeds, **found}.items()}


def assert_near(actual, expected, dtype=torch.float32):
    assert actual.keys() == expected.keys() and len(expected) > 10
    for name, tensor in expected.items():
        error = (actual[name] - tensor).norm() / tensor.norm()
        assert error <= TOLERANCE[dtype] / (4 if name == "embeds" else 1), f"{name} is off by {error:.2%}"


@pytest.mark.parametrize("modality", ["gen", MIXED], ids=["gen", "mixed"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_autocast_is_near_float32(clip_folder, device, dtype, modality):
    expected = step(make_model(clip_folder), "cpu", modality=modality)
    assert_near(step(make_model(clip_folder), device, dtype, modality), expected, dtype)


@pytest.mark.parametrize("kernel", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "eager"])
def test_attention_kernels_agree(clip_folder, device, kernel):
    if device == "cpu" and kernel == "EFFICIENT_ATTENTION":
        pytest.skip("a kernel of CUDA alone")
    expected = step(make_model(clip_folder), "cpu", modality=MIXED)
    model = make_model(clip_folder)
    if kernel == "eager":
        model.set_attn_implementation("eager")
        actual = step(model, device, torch.bfloat16, MIXED)
    else:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            actual = step(model, device, torch.bfloat16, MIXED)
    assert_near(actual, expected, torch.bfloat16)


def test_gradient_caching_is_a_plain_batch(clip_folder, device):
    expected = step(make_model(clip_folder), "cpu")
    assert_near(step(make_model(clip_folder), device, mini_batch_size=2), expected)


def test_gather_by_one_process(clip_folder, device, tmp_path):
    expected = step(make_model(clip_folder), "cpu")
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model(clip_folder).to(device)
        model.freeze_base()
        parallel = DistributedDataParallel(model)
        output = parallel(generated_pixel_values=pixels(4).to(device), real_pixel_values=pixels(4, 1).to(device))
        generated, real = (_AllGather.apply(e)[0] for e in (output.gen_embeds, output.real_embeds.detach()))
        alignment_loss(generated, real, temperature=0.5).backward()
        found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found["embeds"] = generated.detach().cpu()
        assert_near(found, {name: expected[name] for name in found})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_trainer_learns_the_same(clip_folder, device, tmp_path, precision):
    if device == "cpu" and precision == "fp16":
        pytest.skip("the Trainer scales gradients on CUDA alone")

    def train(use_cpu: bool, **fields) -> dict[str, torch.Tensor]:
        model = make_model(clip_folder)
        before = {name: p.detach().clone() for name, p in model.adapter_parameters()}
        args = GmailTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            optim="sgd",  # whose step is in proportion to the gradient
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=use_cpu,
            **fields,
        )
        trainer = GmailTrainer(model=model, args=args, train_dataset=make_pairs(8), processing_class=make_processor())
        if "fp16" in fields:  # the usual scale, 65536, overflows at first, and such steps are skipped
            trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
        trainer.train()
        assert model.device.type == ("cpu" if use_cpu else "cuda")
        return {name: p.detach().cpu() - before[name] for name, p in model.adapter_parameters() if "gen" in name}

    expected = train(use_cpu=True)
    fields = {} if precision == "float32" else {precision: True}
    actual = train(use_cpu=device == "cpu", **fields)
    assert_near(actual, expected, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_is_repeatable_and_near_the_cpu(device, tmp_path, monkeypatch, dtype):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "captions.csv").write_text("caption\n" + "\n".join(f"thing {row}" for row in range(8)))

    def images(name: str, dtype: str, device: str) -> np.ndarray:
        args = SynthesisArguments(
            output_dir=str(tmp_path / name),
            dataset=str(tmp_path / "captions.csv"),
            generator=str(tmp_path / "pipeline"),
            num_inference_steps=2,
            batch_size=4,
            shard_size=8,
            dtype=dtype,
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
            folder = synthesize(args).path
        rows = datasets.load_dataset(str(folder), split="train")
        return np.stack([np.asarray(image, float) for image in rows["generated_image"]])  # (8, 16, 16, 3), 0 to 255

    first = images("first", dtype, device)
    assert len(np.unique(first, axis=0)) == 8
    assert np.array_equal(images("second", dtype, device), first)
    # In the same precision, since torch before 2.13 draws other noise in bfloat16.
    difference = np.abs(first - images("reference", dtype, "cpu"))
    assert difference.mean() <= {"float32": 0.05, "bfloat16": 3}[dtype]


@pytest.mark.integration
def test_compiled_layers_compute_the_same(clip_folder, device):
    """The last test, since compiling takes longer than all others."""
    expected = step(make_model(clip_folder), "cpu")
    model = make_model(clip_folder)
    torch.compiler.reset()
    for layer in model.vision_model.encoder.layers:
        layer.compile(backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True)
    assert_near(step(model, device, torch.bfloat16), expected, torch.bfloat16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # it was compiled
