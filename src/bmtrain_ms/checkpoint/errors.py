"""What can go wrong with a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; raised on every rank alike."""
