"""What a config will do and cost, before it runs, and what other schedules would have come to."""
