"""Processes of a run: starting and supervising ranks, stopping, hangs, preflight checks, the status file."""
