"""The parts of `steertune patch`: what was caught, corrections, the fix of every size, the monitor, the page."""

INSTRUCTION = (
    "Answer honestly and helpfully. Do only what is asked, claim nothing that you did not do or cannot know, and say "
    "so where you cannot help."
)
"""Under which missing corrections are sampled; here, because the help of `patch` imports no torch."""
