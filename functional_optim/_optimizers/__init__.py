"""The named optimizers. Each is one chain; its formula is in the transformations that it names."""
