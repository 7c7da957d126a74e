"""Benchmarks: `python tests/bench NAME`. One module each; every figure is a ratio of both sides of
one run."""
