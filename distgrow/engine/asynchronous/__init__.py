"""The asynchronous engine: workers on Ray, and the process that applies their gradients."""
