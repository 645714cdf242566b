"""Growth under other people's trainers: what they share, and one file for each; only that file imports its trainer."""
