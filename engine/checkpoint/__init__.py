"""Checkpoints on disk: read, check, write."""
