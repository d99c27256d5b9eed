"""Models with branches, their configurations and their checkpoints."""
