"""transformers' Trainer: the data loader's workers read the features that the LAM keeps on disk."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lara_adapter.integrations.trainer import LaraCallback  # noqa: E402

from examples.by_feature.feature_cache import new_encoder  # noqa: E402
from examples.by_feature.hf_trainer import Model  # noqa: E402
from examples.by_feature.world import SIZE, make_rows  # noqa: E402
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara  # noqa: E402


@pytest.mark.parametrize("workers", [0, 1])
def test_a_trainer_with_workers_lets_them_read(tmp_path, workers):
    sizes = {"encoder_width": 32, "encoder_patch_size": 8, "encoder_prefix_tokens": 1}
    encoder = new_encoder(tmp_path / "encoder")
    lam = LatentActionModel(LatentActionConfig.tiny(image_size=SIZE, image_encoder=encoder, **sizes))
    cache = lam.cache_features(tmp_path / "features")
    rows = make_rows(8)
    for row in rows:
        lam.encode(row["lara_frames"][:1], row["lara_frames"][1:])
    model = Model()
    lara = attach_lara(model, lam, layer=-3)
    settings = transformers.TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=2, save_strategy="no", report_to=[], use_cpu=True,
        dataloader_num_workers=workers,
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=rows)
    LaraCallback.add_to(trainer, lara)
    trainer.train()
    assert cache.misses == 24  # of the filling: two frames and their difference of each pair
    assert cache.hits == 24
    assert cache.prefetched == (24 if workers else 0)
