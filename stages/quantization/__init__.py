"""Quantization: packed formats of sources (`sources/`), algorithms of targets (`targets/`), and the kernels' order (`kernels/`)."""
