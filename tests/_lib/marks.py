"""Marks that several modules share."""

import pytest


# Triton's interpreter runs programs on NumPy, which warns where torch is silent, of overflow and of what is not a
# number; and it counts loops in a way that NumPy wants to forbid
INTERPRETER = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")
