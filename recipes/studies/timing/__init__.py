"""The parts of `studies/benchmark.py`: the ways to train, the bare matrix products, the profile of a step."""
