"""Ray: the driver, the worker group and what a worker does beside training; only this folder imports ray."""
