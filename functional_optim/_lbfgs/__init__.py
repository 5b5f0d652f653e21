"""The mathematics of L-BFGS over flat vectors: the two-loop recursion and three line searches.

A search is given a function that evaluates the objective at a step along the direction, and knows no parameters.
"""
