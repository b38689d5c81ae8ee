"""Calibration out of core: the ranges of activations that SmoothQuant, FP8 and 8-bit caches have scales of, a layer at a time."""
