"""Synthetic pairs: captions and any text-to-image pipeline of diffusers to shards of a data set."""

from .arguments import SynthesisArguments
from .engines import synthesize
from .push import push_dataset
from .sampler import generate_shard

__all__ = ["SynthesisArguments", "generate_shard", "push_dataset", "synthesize"]
