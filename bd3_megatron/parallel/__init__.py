"""Parallel: the grid as an object, its process groups, and the rows of the pair that a rank holds."""
