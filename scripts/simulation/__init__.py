"""The parts of `scripts/simulate.py`: what is laid out, how, what a rank of it sends, and how long that would take."""
