"""The parts of `studies/planted.py`: teachers and their data, the verdict of a study, the page."""
