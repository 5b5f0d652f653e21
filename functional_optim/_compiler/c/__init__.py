"""C: text of a pass."""
