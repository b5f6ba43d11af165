"""The parts of `recipes/planted.py`: teachers and their data, what a study says, the page."""
