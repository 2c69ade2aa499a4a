"""Getting processes started, on this machine (`local`) or through SLURM (`slurm`), with the settings of `env`.

Everything here answers in under a second and imports no torch: a login node may have none.
"""
