"""Schedules, functions of the step: each file holds a family. Names, arguments and values are optax's."""
