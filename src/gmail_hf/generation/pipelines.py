"""Text-to-image pipelines of diffusers. Their arguments are checked before weights are loaded."""

import hashlib
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..publishing.provenance import local_path
from .arguments import DEFAULT_STEPS, SynthesisArguments

PIECE = 1 << 20

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Generator:
    """
    A diffusers pipeline that is not yet loaded, see [`describe_generator`].

    Attributes:
        name: id given by the user.
        path: Hub id or folder for `from_pretrained`.
        revision: commit on the Hub, or a digest of a local folder's files.
        pipeline_class: class of the pipeline.
        scheduler: class name of the scheduler to use. It replaces the pipeline's own scheduler if it differs.
        dtype: name of the weights' dtype.
        call: keyword arguments of each call, without prompts and random generators.
        guidance_scale: guidance scale of the call, or the pipeline's default. None if it has none.
        compile: whether to compile the denoiser.
    """

    name: str
    path: str
    revision: str
    pipeline_class: type
    scheduler: str
    dtype: str
    call: dict[str, Any]
    guidance_scale: float | None
    compile: bool

    def load(self, device: torch.device) -> Any:
        """Load the pipeline on a device."""
        import diffusers

        # Reproducible images: fixed convolution algorithms on a GPU, and a fixed order of sums on a CPU.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        if device.type == "cpu":
            torch.set_num_threads(1)
        hub = {} if os.path.isdir(self.path) else {"revision": self.revision}
        pipeline = self.pipeline_class.from_pretrained(
            self.path, dtype=getattr(torch, self.dtype), use_safetensors=True, **hub
        )
        if self.scheduler and type(pipeline.scheduler).__name__ != self.scheduler:
            pipeline.scheduler = getattr(diffusers, self.scheduler).from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        pipeline = pipeline.to(device)
        if self.compile:
            denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
            denoiser.compile()
        return pipeline


def describe_generator(args: SynthesisArguments, path: str | None = None) -> Generator:
    """
    Read the pipeline's `model_index.json` and check that it supports the options in `args`. No weights are loaded.

    Args:
        args: settings of the run.
        path: folder of the pipeline, if `args.generator` is only its name.

    Raises:
        OSError: the pipeline does not exist.
        ValueError: the generator is not a text-to-image pipeline of diffusers, it does not support an option, or the
            scheduler is unknown or incompatible.
    """
    import diffusers
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    path = args.generator if path is None else path
    guidance_scale = args.guidance_scale
    if local_path(path, "pipeline of diffusers") and not os.path.exists(os.path.join(path, "model_index.json")):
        raise OSError(f"'{path}' is not a pipeline of diffusers: it has no model_index.json.")
    index, commit = diffusers.DiffusionPipeline.load_config(
        path, revision=args.generator_revision, return_commit_hash=True
    )
    name = index.get("_class_name")  # a list of module and class if the pipeline has its own code
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline_class is None:
        raise ValueError(f"'{args.generator}' is a {name}, which the installed diffusers does not support.")
    takes = inspect.signature(pipeline_class.__call__).parameters
    needs = [name for name, value in takes.items() if value.default is value.empty and value.kind < value.VAR_KEYWORD]
    text_to_image = set(needs) <= {"self", "prompt"} <= set(takes) and (
        "image" not in takes or pipeline_class in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
    )
    if not text_to_image:
        raise ValueError(f"'{args.generator}' is a {pipeline_class.__name__}, which is not a text-to-image pipeline.")
    call = {
        "num_inference_steps": args.num_inference_steps or DEFAULT_STEPS,
        "guidance_scale": guidance_scale,
        "negative_prompt": args.negative_prompt,
        "height": args.image_size,
        "width": args.image_size,
    }
    call = {name: value for name, value in call.items() if value is not None}
    refused = [name for name in call if name not in takes]
    if refused:
        raise ValueError(f"{pipeline_class.__name__} of '{args.generator}' does not accept {refused}.")
    if guidance_scale is None and "guidance_scale" in takes:
        guidance_scale = takes["guidance_scale"].default
    classifier_free = takes["true_cfg_scale"].default if "true_cfg_scale" in takes else guidance_scale
    if args.negative_prompt and classifier_free is not None and classifier_free <= 1:
        logger.warning(
            f"{pipeline_class.__name__} ignores the negative prompt, because its classifier-free guidance scale is "
            f"{classifier_free}."
        )
    own = index.get("scheduler", (None, None))[1]
    if args.scheduler:
        _check_scheduler(args.scheduler, own)
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return Generator(
        name=args.generator,
        path=path,
        revision=_digest(Path(path)) if os.path.isdir(path) else commit or args.generator_revision or "main",
        pipeline_class=pipeline_class,
        scheduler=args.scheduler or own,
        dtype=dtype,
        call=call,
        guidance_scale=guidance_scale,
        compile=args.compile,
    )


def device_of_process() -> torch.device:
    """Return the device of this process: a GPU by local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def native_size(pipeline: Any) -> int:
    """Return the default height and width of a pipeline's images in pixels, or 512 if unknown."""
    config = getattr(getattr(pipeline, "unet", None), "config", None)
    latents = getattr(pipeline, "default_sample_size", None) or getattr(config, "sample_size", None)
    scale = getattr(pipeline, "vae_scale_factor", None)  # missing in DeepFloyd IF and Kandinsky
    return latents * scale if isinstance(latents, int) and isinstance(scale, int) else 512


def _check_scheduler(name: str, own: str | None) -> None:
    import diffusers

    scheduler_class = getattr(diffusers, name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise ValueError(
            f"diffusers has no scheduler '{name}'; it has DDIMScheduler, EulerDiscreteScheduler and others."
        )
    own_class = getattr(diffusers, own or "", None)
    compatible = [own, *getattr(own_class, "_compatibles", [])]
    if own_class is not None and name not in compatible:
        raise ValueError(f"The pipeline's {own} cannot be replaced by {name}. Choose from {sorted(compatible)}.")


def _digest(folder: Path) -> str:
    """Hash the names, sizes, beginnings and ends of a local pipeline's files, which reads at most a few megabytes."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".safetensors", ".txt", ".model"):
            continue
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
            for start in (0, max(0, size - PIECE)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()
