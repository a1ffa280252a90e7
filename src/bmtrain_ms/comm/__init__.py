"""Moving bytes between ranks."""

from bmtrain_ms_base.mesh import Mesh

from .agreement import SharedError, agree, all_gather_bytes, all_ranks, any_rank, gather_json, reduce_numbers
from .engine import Buffer, Clock, CommError, CommTimeoutError, Engine, Label, Work
from .launch import Launch
from .simulated import SimulatedEngine
from .single import SingleEngine
from .trace import Span, Trace, TracingEngine, write_trace
from .world import (
    World,
    init_distributed,
    is_initialized,
    rank,
    shutdown,
    synchronize,
    use_world,
    world,
    world_size,
)
from .wrappers import Event, FabricEngine, RecordingEngine

__all__ = [
    "Buffer",
    "Clock",
    "CommError",
    "CommTimeoutError",
    "Engine",
    "Event",
    "FabricEngine",
    "Label",
    "Launch",
    "Mesh",
    "RecordingEngine",
    "SharedError",
    "SimulatedEngine",
    "SingleEngine",
    "Span",
    "Trace",
    "TracingEngine",
    "Work",
    "World",
    "agree",
    "all_gather_bytes",
    "all_ranks",
    "any_rank",
    "gather_json",
    "init_distributed",
    "is_initialized",
    "rank",
    "reduce_numbers",
    "shutdown",
    "synchronize",
    "use_world",
    "world",
    "world_size",
    "write_trace",
]
