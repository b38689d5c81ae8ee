"""The order in which TensorRT-LLM's kernels read integer weights."""
