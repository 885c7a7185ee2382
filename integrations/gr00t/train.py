"""GR00T's own `experiment.run` with LARA: a pipeline that attaches it, a trainer that logs, saves and resumes it.

`experiment.run` offers no hook. Two globals of its module are replaced during the run: the registry in which it looks up
the pipeline, and the trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lara_adapter import HostNotInstalled, LaraAdapter

from .. import hosts
from ..checkpoints import require_adapter
from ..hosts import import_host, replaced
from ..settings import LaraSettings
from ..trainer import LaraCallback, LaraTrainerMixin
from .frames import add_frames

__all__ = ["INSTALL", "LaraPipeline", "LoraSettings", "lara_experiment", "run", "wrap_in_lora"]

logger = logging.getLogger(__name__)

INSTALL = f"NVIDIA Isaac GR00T is not installed: {hosts.INSTALL['gr00t']}"

_DIT = r".*action_head\.model\.transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"
_HEAD_PROJECTORS = ("state_encoder", "action_encoder", "action_decoder", "position_embedding")


@dataclass
class LoraSettings:
    """LoRA on the blocks of the DiT; the rest of the policy is frozen, the action head's encoders as `tune_projector`.

    Attributes:
        rank: 0: no LoRA, GR00T's tune_* flags decide what trains.
        alpha: the update is multiplied by alpha / rank.
        dropout: before the update.
    """

    rank: int = 0
    alpha: int = 32
    dropout: float = 0.0


def wrap_in_lora(model: Any, lora: LoraSettings, tune_projector: bool = True) -> Any:
    """GR00T with LoRA on every attention and feed-forward matrix of its DiT.

    Args:
        model: Gr00tN1d6 or a model with the same action head.
        lora: rank > 0.
        tune_projector: also train, in full, the action head's state and action encoders and decoder, which a new
            embodiment needs; each is duplicated.

    Returns:
        A PeftModel.
    """
    from peft import LoraConfig, get_peft_model

    head = model.action_head
    saved = [name for name in _HEAD_PROJECTORS if hasattr(head, name)] if tune_projector else None
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=_DIT, modules_to_save=saved
    )
    return get_peft_model(model, config)


class LaraPipeline:
    """Mixed into a GR00T pipeline: after its own setup the dataset yields frames and LARA is attached to the model.

    `LaraPipeline.on(Gr00tN1d6Pipeline, settings)` makes a class for GR00T's registry.

    Attributes:
        settings: LARA's.
        lora: LoRA's; rank 0 for none.
        lara: the adapter, after :meth:`setup`.
        frames: what the LAM sees of each dataset, likewise.
    """

    settings: LaraSettings
    lora: LoraSettings = LoraSettings()
    lara: LaraAdapter | None = None
    frames: dict[str, Any] | None = None

    @classmethod
    def on(cls, pipeline: type, settings: LaraSettings, lora: LoraSettings | None = None) -> type[LaraPipeline]:
        """A subclass of Gr00tN1d6Pipeline, or of any class with its `setup`, `model`, `train_dataset` and `config`."""
        content = {"settings": settings, "lora": lora or LoraSettings()}
        return type(f"Lara{pipeline.__name__}", (cls, pipeline), content)

    def setup(self) -> None:
        """GR00T's setup, then LoRA if its rank is above 0, the frames and LARA.

        Raises:
            LaraError: see :func:`add_frames` and :func:`lara_adapter.attach_lara`.
        """
        lam = self.settings.build_lam()  # before the minutes that the policy takes to load
        super().setup()  # type: ignore[misc]
        pipeline: Any = self
        if self.lora.rank > 0:
            pipeline.model = wrap_in_lora(pipeline.model, self.lora, pipeline.config.model.tune_projector)
        size = self.settings.frame_size_for(lam)
        placed = add_frames(
            pipeline.train_dataset, views=self.settings.views or None, gap=self.settings.gap, frame_size=size
        )
        type(self).frames = {
            "views": [list(each.views) for each in placed], "gap": [each.gap for each in placed], "frame_size": size,
        }  # fmt: skip
        self.lara = type(self).lara = self.settings.attach(pipeline.model, lam)


@contextmanager
def lara_experiment(
    config: Any, settings: LaraSettings, lora: LoraSettings | None = None
) -> Iterator[type[LaraPipeline]]:
    """Within this context `gr00t.experiment.experiment.run(config)` trains with LARA.

    Args:
        config: GR00T's Config; it decides which pipeline is meant.
        settings: LARA's.
        lora: None: no LoRA.

    Yields:
        The pipeline class; its `lara` is the adapter once the run has set up.

    Raises:
        HostNotInstalled: gr00t cannot be imported, or its `run` is not the one this was written for.
        AttachOrderError: the output folder holds a run without LARA, which GR00T would resume.
    """
    experiment = import_host("gr00t.experiment.experiment")
    registry, kind = experiment.MODEL_REGISTRY, type(config.model)
    if kind not in registry or not hasattr(experiment, "Gr00tTrainer"):
        raise HostNotInstalled(
            f"this gr00t has no pipeline for {kind.__name__}, or its experiment.py no Gr00tTrainer; tested with N1.6. "
            "Attach in your own loop instead: attach_lara(model, lam) and add_frames(train_dataset)"
        )
    _refuse_foreign_checkpoint(config)
    pipeline = LaraPipeline.on(registry[kind], settings, lora)

    class Gr00tLaraTrainer(LaraTrainerMixin, experiment.Gr00tTrainer):  # type: ignore[name-defined]
        lam_lr = settings.lam_lr

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert pipeline.lara is not None  # the pipeline's setup comes first
            LaraCallback.add_to(self, pipeline.lara, pipeline.frames)

    with replaced(experiment, MODEL_REGISTRY={**registry, kind: pipeline}, Gr00tTrainer=Gr00tLaraTrainer):
        yield pipeline


def run(config: Any, settings: LaraSettings, lora: LoraSettings | None = None) -> LaraAdapter:
    """GR00T's `experiment.run(config)` with LARA; it resumes from the last checkpoint of the output folder, as GR00T does.

    For arguments and errors see :func:`lara_experiment`.

    Returns:
        The adapter, still attached to the trained model (`.policy`).
    """
    with lara_experiment(config, settings, lora) as pipeline:
        import_host("gr00t.experiment.experiment").run(config)
    assert pipeline.lara is not None  # GR00T's run calls its setup
    return pipeline.lara


def output_folder(config: Any) -> Path:
    """Where GR00T writes the checkpoints of a run."""
    folder = Path(config.training.output_dir)
    return folder / config.training.experiment_name if config.training.experiment_name else folder


def _refuse_foreign_checkpoint(config: Any) -> None:
    """GR00T always resumes; from a run without LARA it would fail minutes later, in the optimizer."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = output_folder(config)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None:
        fix = (
            f"GR00T would resume it: choose another output folder, and start from its weights: --base-model-path {last}"
        )
        require_adapter(Path(last), fix)
