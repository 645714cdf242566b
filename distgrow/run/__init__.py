"""A run's folder on disk: its files, its lock, its requests, and what may change on resume."""
