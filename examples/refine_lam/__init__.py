"""Is a LAM a better labeller after LARA? `python -m examples.refine_lam`."""
