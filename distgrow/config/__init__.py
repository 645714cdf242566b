"""The whole YAML as one typed value, its overrides, and its errors for users."""
