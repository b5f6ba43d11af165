"""Callbacks of the trainers: guards, metrics, checkpoints. One file each."""
