"""Train: the loop, what it is wired from, and what it writes. Arithmetic lives elsewhere."""
