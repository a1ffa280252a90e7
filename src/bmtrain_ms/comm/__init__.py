"""Moving bytes between ranks."""

from .engine import Buffer, Clock, CommError, CommTimeoutError, Engine, Label, Work, all_gather_bytes
from .launch import Launch
from .mesh import Mesh
from .simulated import SimulatedEngine
from .single import SingleEngine
from .trace import Span, Trace, TracingEngine, write_trace
from .world import (
    Hierarchy,
    World,
    init_distributed,
    is_initialized,
    make_hierarchy,
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
    "Hierarchy",
    "Label",
    "Launch",
    "Mesh",
    "RecordingEngine",
    "SimulatedEngine",
    "SingleEngine",
    "Span",
    "Trace",
    "TracingEngine",
    "Work",
    "World",
    "all_gather_bytes",
    "init_distributed",
    "is_initialized",
    "make_hierarchy",
    "rank",
    "shutdown",
    "synchronize",
    "use_world",
    "world",
    "world_size",
    "write_trace",
]
