"""The names of scores, tables of them, and the environment that they were measured in."""
