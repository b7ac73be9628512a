"""The memory, which holds what lasts between steps, and its form in checkpoints."""

from dist_clip.memory.memory import Memory, PolicyGroup, Rule, checked_rules

__all__ = ["Memory", "PolicyGroup", "Rule", "checked_rules"]
