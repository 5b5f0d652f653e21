"""Steps over parameters that each count their own steps, the core of a stateful optimizer.

In the pure API a transformation counts steps for the whole tree, and its numbers are the same for every leaf. Here a
parameter brings a flat dict of state, its counter `step` among it, and options, a mapping that hyper-parameters are
looked up in. All parameters still share one kernel per pass, whatever their options are.
"""
