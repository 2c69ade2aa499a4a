"""Tests on several real processes (gloo on CPU); see harness.py."""
