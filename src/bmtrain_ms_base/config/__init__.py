"""The settings of a run: what they are, and how they are read. No MindSpore; pydantic (the extra `train`) is needed."""

from .fitting import passes_of
from .reading import ConfigError, read_settings, schema, to_toml
from .sections import (
    BatchSection,
    DataSection,
    FaultsSection,
    LayoutSection,
    LogSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    RampUpSection,
    SaveSection,
    ScheduleSection,
    Settings,
    TokenizerSection,
    TrainSection,
)

__all__ = [
    "BatchSection",
    "ConfigError",
    "DataSection",
    "FaultsSection",
    "LayoutSection",
    "LogSection",
    "LoraSection",
    "ModelSection",
    "OptimizerSection",
    "RampUpSection",
    "SaveSection",
    "ScheduleSection",
    "Settings",
    "TokenizerSection",
    "TrainSection",
    "passes_of",
    "read_settings",
    "schema",
    "to_toml",
]
