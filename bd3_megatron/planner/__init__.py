"""Time and memory of a run on a machine it has not seen: machines, time model, search over grids. Torch-free."""
