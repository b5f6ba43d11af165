"""Default limits of a service, apart from the code that uses them, since `--help` must start quickly."""

BATCH = 8
"""Number of answers generated at the same time."""
LONGEST = 1024
"""Maximum length of an answer, in tokens."""
SECONDS = 600
"""Time limit of a request."""
QUEUE = 256
"""Maximum number of waiting answers."""
LOOPBACK = "127.0.0.1"
"""The address that only this machine can reach."""
