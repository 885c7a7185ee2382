"""LARA for any diffusion-transformer robot policy."""

__version__ = "0.1.0"
