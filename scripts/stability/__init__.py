"""The parts of `scripts/study.py`: which runs there are, running them, what is measured of each, tables and figures."""
