"""What `gmail-hf` and the scripts in examples/ run: one file per command."""
