"""Watching a run: every tensor's norm beside its usual one, spikes with their culprits, writers, and reading a log."""

from dist_clip.monitor.monitor import ClipMonitor
from dist_clip.monitor.names import Group, groups_of
from dist_clip.monitor.record import Culprit, Record, Spike, Tensors, Writer
from dist_clip.monitor.run import Run, read_run, rule_of
from dist_clip.monitor.spikes import SpikeDetector, spikes
from dist_clip.monitor.writers import JSONLWriter, MLflowWriter, TensorBoardWriter, WandbWriter

__all__ = [
    "ClipMonitor",
    "Culprit",
    "Group",
    "JSONLWriter",
    "MLflowWriter",
    "Record",
    "Run",
    "Spike",
    "SpikeDetector",
    "TensorBoardWriter",
    "Tensors",
    "WandbWriter",
    "Writer",
    "groups_of",
    "read_run",
    "rule_of",
    "spikes",
]
