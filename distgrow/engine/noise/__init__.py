"""Gradient noise of an update, measured at no gradient evaluations."""
