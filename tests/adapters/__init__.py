"""Tests against the training frameworks that dist_clip has adapters for; each is skipped where it is not installed."""
