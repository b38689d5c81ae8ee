"""Logits: run the ranks as TensorRT-LLM's classes compute them, and the source with transformers."""
