"""The stages that tensors pass through, one file each. Pure: they import values from `pipeline`, never how work is run."""
