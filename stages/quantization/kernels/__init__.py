"""The loops that every value goes through: in C, with twins in NumPy, and the order in which TensorRT-LLM's kernels read weights.

`dispatch.kernels()` is all that callers need. A C file and its twin have one name.
"""
