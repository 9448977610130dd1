"""Bottleneck adapters as a PEFT method: importing this package registers BOTTLENECK with PEFT."""

from .config import BottleneckConfig
from .layer import BottleneckLayer
from .tuner import BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
