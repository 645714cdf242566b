"""What other schedules would have come to: a law fitted to one recorded run (`what-if`), and the table of them."""
