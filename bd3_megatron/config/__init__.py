"""What a run is, as data: `schema` declares it, `load` reads it, `validate` refutes it before any rank starts.

Nothing here imports torch: a launcher on a login node reads and refutes a configuration in well under a second.
"""
