"""Model, loss and data behind a spec: built in, or the user's own."""
