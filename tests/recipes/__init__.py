"""The recipes for real, on a tiny model, inside their own environment."""
