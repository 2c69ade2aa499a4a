"""Compat: every assumption about a version or device of a foreign engine, beside the upstream file it works around.

Nothing here knows block diffusion. Elsewhere `torch.cuda` is named once, where attention/machine.py asks for a capability.
"""
