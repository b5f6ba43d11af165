"""The parts of `recipes/studies/gpu.py`: a made-up model with its tokenizer, the checks, and the timed steps."""
