"""Schedules, functions of the step: each file holds a family.

Names, arguments and values are optax's where optax has the schedule; `from_torch.py` makes torch's schedulers of them.
"""
