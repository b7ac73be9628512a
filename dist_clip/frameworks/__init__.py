"""Integrations that build on the clipper, one folder a framework; each needs its framework only when it is used."""
