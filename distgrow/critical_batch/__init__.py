"""The critical batch, measured by branches of a checkpoint (`probe-batch`) or by runs at several (`fit-batch`)."""
