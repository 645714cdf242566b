"""What a config will do and cost, before it runs."""
