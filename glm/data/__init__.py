"""Datasets: where they come from (registry), what their rows become (rows), how they are split, encoded and batched."""
