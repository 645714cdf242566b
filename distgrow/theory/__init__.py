"""Formulas from papers: plain numbers in, plain numbers out."""
