"""The transformations, one idea a file. Each is the formula for one leaf, as in its paper."""
