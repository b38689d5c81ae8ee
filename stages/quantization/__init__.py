"""Quantization: what sources pack (`sources/`), what targets hold (`targets/`), and the kernels' order (`kernels/`)."""
