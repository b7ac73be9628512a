"""The memory, which holds what lasts between steps, and its form in checkpoints."""

from dist_clip.memory.memory import GuardMemory, Memory, PolicyGroup, Rule

__all__ = ["GuardMemory", "Memory", "PolicyGroup", "Rule"]
