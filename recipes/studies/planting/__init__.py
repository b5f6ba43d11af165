"""The parts of `studies/planted.py`: teachers and their data, the verdict of a study, the page."""

FORMS = ("bias", "gated", "lora")
"""Forms of a teacher."""
PROBLEMS = (*FORMS, "base", "shuffled")
"""What is planted. `base`: all labels are coin flips; `shuffled`: only the training labels are."""
CONTRASTS = ("both", "pair", "chosen", "lora", "coin")
"""How contrast is planted (`contrasts.py` says what each is)."""
WORLDS = ("tiny", "embedded")
"""The models that it is planted in."""
