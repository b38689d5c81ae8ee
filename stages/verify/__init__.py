"""verify: check what TensorRT-LLM would make of a checkpoint, by its files alone and without the code that wrote it."""
