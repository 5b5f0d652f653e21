"""Triton: text of a pass."""
