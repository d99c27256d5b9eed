"""Generates data sets of synthetic pairs from captions with any text-to-image pipeline of diffusers."""

from .arguments import SynthesisArguments
from .curation import curate
from .engines import synthesize
from .masks import apply_mask, read_mask, write_mask
from .push import push_dataset
from .sampler import generate_shard

__all__ = [
    "SynthesisArguments",
    "apply_mask",
    "curate",
    "generate_shard",
    "push_dataset",
    "read_mask",
    "synthesize",
    "write_mask",
]
