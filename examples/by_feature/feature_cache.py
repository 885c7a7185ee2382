"""The frozen image encoder's features, kept on disk: no frame is encoded twice.

pip install -e ".[lam]" && python -m examples.by_feature.feature_cache
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import ViTMAEConfig, ViTMAEModel

from examples.by_feature.world import SIZE, arguments, make_rows, new_policy
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara


def new_encoder(folder: Path) -> str:
    """A tiny ViT-MAE with random weights, so that nothing is downloaded; yours is "facebook/vit-mae-large"."""
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE, patch_size=8
    )
    ViTMAEModel(config).save_pretrained(folder)
    return str(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Train over the same demonstrations again and again."""
    args = arguments(__doc__, argv)
    encoder = new_encoder(args.output / "encoder")
    sizes = {"encoder_width": 32, "encoder_patch_size": 8, "encoder_prefix_tokens": 1}  # of this encoder
    lam = LatentActionModel(LatentActionConfig.tiny(image_size=SIZE, image_encoder=encoder, **sizes))
    cache = lam.cache_features(args.output / "features", max_gb=1)  # New: at most 1 GB; processes may share it
    policy = new_policy()
    attach_lara(policy, lam, layer=-3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.train()
    collate = lam.prefetch_features()  # New: the loader's workers read the features of frames that are known
    loader = DataLoader(make_rows(8), batch_size=4, collate_fn=collate, num_workers=1, persistent_workers=True)
    for _ in range(args.steps // len(loader)):  # frames of demonstrations come again and again
        for batch in loader:
            loss = policy(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"{cache.hits} frames from the cache, {cache.misses} encoded")  # New


if __name__ == "__main__":
    main()
