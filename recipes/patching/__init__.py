"""The parts of `steertune patch`: what was caught, corrections, the fix of every size, the monitor, the page."""
