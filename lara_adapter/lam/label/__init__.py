"""The latent action of every frame of a dataset, as features of a copy of it."""

from .run import label_dataset

__all__ = ["label_dataset"]
