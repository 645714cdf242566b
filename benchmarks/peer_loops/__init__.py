"""The same training by hand and by others' trainers, as their users would write it: what peers.py compares."""
