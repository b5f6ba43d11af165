"""The parts of `recipes/sweep.py`: what is swept, what is measured, what is chosen, and the page."""
