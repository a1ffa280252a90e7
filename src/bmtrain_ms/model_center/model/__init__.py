"""Models."""

from .llama import Llama, LlamaConfig

__all__ = ["Llama", "LlamaConfig"]
