"""The report of runs and its live page, made from run folders alone."""
