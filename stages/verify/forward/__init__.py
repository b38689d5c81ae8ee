"""Logits: the ranks run as TensorRT-LLM's classes compute them, and the source run by transformers."""
