"""Data sets of every kind, and the loader that draws the rows of a plan."""
