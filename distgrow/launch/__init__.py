"""How the ranks of a run are started and resized: local processes, Ray."""
