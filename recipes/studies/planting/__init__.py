"""The parts of `recipes/planted.py`: teachers and their data, what a study says, the page."""

FORMS = ("bias", "gated", "lora")
"""Forms of a teacher."""
PROBLEMS = (*FORMS, "base", "shuffled")
"""What is planted; `base`: a coin decides all labels, `shuffled`: it decides those of training."""
