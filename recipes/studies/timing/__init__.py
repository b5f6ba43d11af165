"""The parts of `recipes/benchmark.py`: the ways to train, the bare matrix products, and where a step goes."""
