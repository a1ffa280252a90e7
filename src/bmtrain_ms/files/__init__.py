"""Safetensors files, and what a model's tensors are to them: read by ranges, gathered to be written, replaced in one instant."""
