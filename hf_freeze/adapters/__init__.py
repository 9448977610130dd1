"""Bottleneck adapters as a PEFT method: importing this package registers BOTTLENECK with PEFT."""

from .config import BottleneckConfig
from .tuner import BottleneckLayer, BottleneckModel

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]
