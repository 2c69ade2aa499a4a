"""Checkpoints: names and bytes, never meanings. Saving, verifying, loading on any grid, reading offline.

May not live here: what a number in the train state means (train), how tensors are called elsewhere (convert).
"""
