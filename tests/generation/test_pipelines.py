"""What a pipeline takes is known before its weights are loaded."""

import json
from types import SimpleNamespace

import pytest
import torch

from gmail_hf.generation.pipelines import describe_generator, native_size


@pytest.fixture
def index_of(tmp_path, make_args):
    """The arguments of a run on a pipeline of which nothing but its index is there."""

    def make(class_name: str, **changes):
        index = {
            "_class_name": class_name,
            "_diffusers_version": "0.41.0",
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return make_args(generator=str(tmp_path), **changes)

    return make


@pytest.mark.parametrize("changes", [{"negative_prompt": "blur"}, {}])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"])
def test_kinds_of_the_issue(index_of, name, changes):
    found = describe_generator(index_of(name, image_size=512, guidance_scale=2.0, **changes))
    assert found.call == {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 512, "width": 512} | changes
    assert found.dtype == ("bfloat16" if torch.cuda.is_available() else "float32")


def test_default_guidance_is_told_not_passed(index_of):
    found = describe_generator(index_of("StableDiffusionPipeline"))
    assert found.guidance_scale == 7.5 and "guidance_scale" not in found.call


@pytest.mark.parametrize(
    ("name", "scale", "ignored"),
    [
        ("StableDiffusionXLPipeline", 0.0, "scale is 0.0"),
        ("StableDiffusionXLPipeline", None, ""),
        ("FluxPipeline", 3.5, "scale is 1.0"),
    ],
)
def test_a_negative_prompt_that_is_ignored_is_reported(index_of, caplog, name, scale, ignored):
    describe_generator(index_of(name, guidance_scale=scale, negative_prompt="blur"))
    assert ignored in caplog.text and ("ignores the negative prompt" in caplog.text) == bool(ignored)


def test_default_steps_are_the_papers(index_of):
    args = index_of("StableDiffusionPipeline", num_inference_steps=None)
    assert describe_generator(args).call["num_inference_steps"] == 50


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("WuerstchenDecoderPipeline", {}, "is not a text-to-image pipeline"),
        ("StableDiffusionImg2ImgPipeline", {}, "is not a text-to-image pipeline"),
        ("NoSuchPipeline", {}, "installed diffusers does not support"),
        (["pipeline", "OwnPipeline"], {}, "OwnPipeline.*installed diffusers does not support"),
        ("FluxPipeline", {"scheduler": "NoScheduler"}, "no scheduler 'NoScheduler'"),
        ("FluxPipeline", {"scheduler": "FluxPipeline"}, "no scheduler 'FluxPipeline'"),
        ("StableDiffusionPipeline", {"scheduler": "FlowMatchEulerDiscreteScheduler"}, "cannot be replaced"),
        ("LDMTextToImagePipeline", {"negative_prompt": "blur"}, r"does not accept \['negative_prompt'\]"),
    ],
)
def test_refused_before_loading(index_of, name, changes, message):
    with pytest.raises(ValueError, match=message):
        describe_generator(index_of(name, **changes))


def test_folder_without_a_pipeline(make_args, tmp_path):
    with pytest.raises(OSError, match="has no model_index.json"):
        describe_generator(make_args(generator=str(tmp_path)))


def test_scheduler_is_exchanged_and_dtype_obeyed(make_args):
    args = make_args(scheduler="EulerDiscreteScheduler", dtype="bfloat16")
    found = describe_generator(args)
    pipeline = found.load(torch.device("cpu"))
    assert type(pipeline.scheduler).__name__ == found.scheduler == "EulerDiscreteScheduler"
    assert pipeline.unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("parts", "size"),
    [
        ({"unet": {"sample_size": 64}, "vae_scale_factor": 8}, 512),
        ({"unet": {"sample_size": 96}, "default_sample_size": 128, "vae_scale_factor": 8}, 1024),
        ({"unet": {"sample_size": 64}}, 512),  # DeepFloyd IF
        ({"unet": {}}, 512),  # Kandinsky 3
        ({"vae_scale_factor": 8}, 512),
    ],
)
def test_native_size(parts, size):
    """Estimates the disk space of a run, for which any pipeline must do."""
    if "unet" in parts:
        parts = parts | {"unet": SimpleNamespace(config=SimpleNamespace(**parts["unet"]))}
    assert native_size(SimpleNamespace(**parts)) == size


def test_other_weights_are_another_revision(make_args, pipeline_folder, tmp_path):
    import shutil

    copy = shutil.copytree(pipeline_folder, tmp_path / "copy")
    same = describe_generator(make_args(generator=str(copy))).revision
    assert same == describe_generator(make_args()).revision
    weights = next((copy / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert describe_generator(make_args(generator=str(copy))).revision != same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"shard_size": 0}, "`shard_size` must be at least 1"),
        ({"ray_workers": 0}, "`ray_workers` must be at least 1"),
        ({"image_size": 500}, "`image_size` must be a multiple of 8"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"real_images": "copy"}, "`real_images` must be one of"),
        ({"image_format": "gif"}, "`image_format` must be one of"),
        ({"safety_policy": "blur"}, "`safety_policy` must be one of"),
        ({"shard_range": "3"}, "`shard_range` must be 'a:b'"),
        ({"shard_range": "3:3"}, "`shard_range` must be 'a:b'"),
    ],
)
def test_arguments_out_of_range(make_args, changes, message):
    with pytest.raises(ValueError, match=message):
        make_args(**changes)
