"""Data sets, and the loader that draws the rows of a plan."""
