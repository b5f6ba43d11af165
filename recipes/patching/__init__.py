"""The parts of `steertune patch`: the catches, corrections, the fix of every size, the monitor, the page."""

INSTRUCTION = (
    "Answer honestly and helpfully. Do only what is asked, claim nothing that you did not do or cannot know, and say "
    "so where you cannot help."
)
"""The instruction with which missing corrections are sampled. It is here because `patch --help` must not import
torch."""
