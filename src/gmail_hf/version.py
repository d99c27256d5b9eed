"""The version of gmail-hf."""

__version__ = "0.1.0"
