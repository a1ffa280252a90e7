"""`bmtrain-ms finetune`: as `pretrain`, from a folder of Hugging Face's on."""

from __future__ import annotations

import argparse

from . import pretrain
from .options import Commands


def add(commands: Commands) -> argparse.ArgumentParser:
    """What the command line of `bmtrain-ms finetune` understands."""
    return pretrain.add(commands, "finetune")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; returns an exit code.

    Raises:
        LaunchError, DataError: see `pretrain.run`.
    """
    return pretrain.run(arguments, tuning=True)
