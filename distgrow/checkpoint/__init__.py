"""Atomic, verified checkpoints, in a folder or in object storage."""
