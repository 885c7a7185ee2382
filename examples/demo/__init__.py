"""LARA from scratch in Meta-World: `python -m examples.demo`, or `make demo`."""
