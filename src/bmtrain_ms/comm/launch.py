"""Which launcher started this process, and as which rank; see `bmtrain_ms_base.launchers`."""

from bmtrain_ms_base.launchers import Launch, detect, is_scheduler

__all__ = ["Launch", "detect", "is_scheduler"]
