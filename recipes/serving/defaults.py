"""Default limits of a service. Importing them takes no time, as the help of a command needs."""

BATCH = 8
"""Answers at a time."""
LONGEST = 1024
"""Tokens of the longest answer."""
SECONDS = 600
"""Time for a request."""
QUEUE = 256
"""Answers that may wait."""
LOOPBACK = "127.0.0.1"
"""The address that only this machine reaches."""
