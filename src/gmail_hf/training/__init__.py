"""Stage 1: losses, pairs, cached embeddings, the trainer."""
