"""Tests that run in several gloo processes."""
