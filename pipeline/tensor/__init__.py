"""Tensors as the stages pass them to one another: lazy blocks, regions, placements. Knows no model."""
