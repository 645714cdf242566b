"""Policies that grow the batch, one file each, and the Controller that turns Progress into a Plan."""
