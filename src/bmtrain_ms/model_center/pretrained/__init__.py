"""Models in and out of the files of Hugging Face."""

from .differences import PretrainedError
from .family import ConfigError, Family, Piece, Rule
from .models import load_pretrained, write_pretrained

__all__ = ["ConfigError", "Family", "Piece", "PretrainedError", "Rule", "load_pretrained", "write_pretrained"]
