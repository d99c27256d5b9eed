"""The two-branch models and how they are stored."""
