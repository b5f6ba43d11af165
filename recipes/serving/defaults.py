"""Default limits of a service, apart from the code that uses them, since `--help` must start quickly."""

BATCH = 8
"""Answers generated at the same time."""
LONGEST = 1024
"""Tokens of the longest answer."""
SECONDS = 600
"""Time for a request."""
QUEUE = 256
"""Answers that may wait."""
LOOPBACK = "127.0.0.1"
"""The address that only this machine can reach."""
