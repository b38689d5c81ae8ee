"""Calibration out of core: a file of the ranges of activations, which SmoothQuant and an INT8 cache take as `--act_range`."""
