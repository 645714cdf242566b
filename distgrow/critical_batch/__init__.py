"""Branches of a run's checkpoint that measure its critical batch: `distgrow probe-batch`."""
