"""The parts of `recipes/sweep.py`: the request, the steered models, the measurements, the choice and the page."""
