"""verify: what TensorRT-LLM would make of a checkpoint, from its files alone, independently of the stages that wrote it."""
