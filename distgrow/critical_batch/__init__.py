"""The critical batch by branches of a checkpoint or by runs at several, and the largest stable learning rate."""
