"""This process among the ranks: its environment, its collectives, and who hangs."""
