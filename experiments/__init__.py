"""Experiments: one module per method, run from the checkout with `python -m experiments list | run NAME | report`."""
