"""Compat: every assumption about a version or device of a foreign engine, beside the upstream file it works around.

Nothing here knows block diffusion. The only room in which `torch.cuda` may be named.
"""
