"""Torchrun entry points that train for real."""
