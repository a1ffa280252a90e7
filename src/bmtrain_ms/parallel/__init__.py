"""Pipeline parallelism: a schedule's table, run by the ranks of a pipeline; and BMTrain's list of Blocks over stages."""

from .block_list import PipelineTransformerBlockList
from .scheduled import Scheduled
from .shared import Part, outside, refuse_shared
from .stage import Stage
from .visit import Segment

__all__ = ["Part", "PipelineTransformerBlockList", "Scheduled", "Segment", "Stage", "outside", "refuse_shared"]
