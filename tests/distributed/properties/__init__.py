"""Random cases of everything that a clipper may be given, run on gloo processes and compared with the reference."""
