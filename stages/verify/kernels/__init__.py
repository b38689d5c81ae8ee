"""Loops over all values of a verification, in C: `checks` has what callers need, and NumPy does the same where C was not built.

They share no computing with those of the stages that write: orders are given as kernel_orders.py has them.
"""
