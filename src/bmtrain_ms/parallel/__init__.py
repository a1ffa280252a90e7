"""Pipeline parallelism: a schedule's table, run by the ranks of a pipeline; and BMTrain's list of Blocks over stages."""

from .block_list import PipelineTransformerBlockList
from .scheduled import Scheduled
from .stage import Stage
from .visit import Segment

__all__ = ["PipelineTransformerBlockList", "Scheduled", "Segment", "Stage"]
