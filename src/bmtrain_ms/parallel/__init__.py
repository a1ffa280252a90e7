"""Pipeline parallelism: a schedule's table, run by the ranks of a pipeline."""

from .scheduled import Scheduled
from .stage import Stage
from .visit import Segment

__all__ = ["Scheduled", "Segment", "Stage"]
