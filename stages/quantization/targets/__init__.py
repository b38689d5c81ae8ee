"""TensorRT-LLM's quantization algorithms, one file each."""
