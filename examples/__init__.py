"""Runnable examples. Scripts import their neighbours; the packages demo and refine_lam run with `python -m`."""
