"""The parts of `studies/planted.py` and `studies/yardstick.py`: what is planted, teachers and data, arms, pages."""

FORMS = ("bias", "gated", "lora")
"""Forms of a teacher."""
PROBLEMS = (*FORMS, "base", "shuffled")
"""What is planted. `base`: all labels are coin flips; `shuffled`: only the training labels are."""
PLANTS = (
    "both", "pair", "chosen", "lora", "coin", "plain", "spread", "preserve", "sparse", "opposite", "nothing", "few",
    "misled",
)  # fmt: skip
"""What the yardstick plants (`plants.py` says what each is)."""
FACTORS = (
    "contrast", "layer", "form", "layers", "norm", "optimiser", "rejected", "sites", "start", "loss", "augmentation",
)  # fmt: skip
"""What it compares (`students.py` says which two arms)."""
WORLDS = ("tiny", "embedded")
"""The models that it is planted in."""
