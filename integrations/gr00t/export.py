"""From a training checkpoint to a folder that stock GR00T loads, on a machine where lara_adapter is not installed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from lara_adapter import AdapterFormatError
from lara_adapter.binding import ADAPTER_NAME
from lara_adapter.storage.files import read_json, replace_folder, write_json

__all__ = ["export_policy"]

logger = logging.getLogger(__name__)

_PREFIX = f"{ADAPTER_NAME}."  # of every LARA tensor in the state_dict of a GR00T model
_INDEX = "model.safetensors.index.json"
# what only a resumed run needs, as transformers' Trainer and DeepSpeed write it
_TRAINING = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "trainer_state.json", "training_args.bin", "latest",
    "rng_state*.pth", "zero_to_*.py",
)  # fmt: skip
_CONFIG_FOLDER = "experiment_cfg"  # the one folder in a checkpoint that belongs to the policy
_PROCESSOR = "processor"  # folder in the output folder of a run; a checkpoint has its files at the top


def export_policy(checkpoint: str | Path, target: str | Path, *, base_model: str | None = None) -> Path:
    """Write the policy of a checkpoint without LARA.

    Of a full fine-tune the tensors are copied file by file, without building the model. Of a LoRA run the base model is
    loaded (in float32, on the CPU) and the LoRA weights are merged into it; gr00t must then be installed.

    Args:
        checkpoint: `checkpoint-<step>` or the output folder of a run.
        target: is created or replaced, whole or not at all.
        base_model: of a LoRA run: folder or Hub id of the base model; None: the one named in the checkpoint.

    Returns:
        `target`, which `Gr00tPolicy(model_path=target)` loads.

    Raises:
        AdapterFormatError: not a checkpoint of a GR00T model.
    """
    checkpoint, target = Path(checkpoint), Path(target)
    if target.resolve() == checkpoint.resolve():
        raise AdapterFormatError(f"export_policy: target is the checkpoint itself, {target}; choose another folder")
    lora = (checkpoint / "adapter_config.json").is_file()
    shards = sorted(checkpoint.glob("model*.safetensors"))
    if not lora and not shards:
        raise AdapterFormatError(
            f"{checkpoint} holds neither model*.safetensors nor adapter_config.json: not a checkpoint of a GR00T run"
        )
    with replace_folder(target, keep_others=False) as fresh:
        for entry in sorted(checkpoint.iterdir()):
            if _serves_acting(entry):
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, fresh / entry.name)
        if (checkpoint / _PROCESSOR).is_dir():
            shutil.copytree(checkpoint / _PROCESSOR, fresh, dirs_exist_ok=True)
        if lora:
            _merge_lora(checkpoint, fresh, base_model)
        else:
            _copy_without_lara(checkpoint, shards, fresh)
    return target


def _serves_acting(entry: Path) -> bool:
    if entry.is_dir():  # an output folder also holds checkpoints, and maybe an earlier export
        return entry.name == _CONFIG_FOLDER
    return not any(map(entry.match, (*_TRAINING, "model*.safetensors*", "adapter_*", "README.md")))


def _copy_without_lara(checkpoint: Path, shards: list[Path], fresh: Path) -> None:
    kept, dropped, total = {}, 0, 0
    for shard in shards:
        with safe_open(shard, framework="pt") as stream:
            names = [name for name in stream.keys() if not name.startswith(_PREFIX)]  # noqa: SIM118
            dropped += len(stream.keys()) - len(names)
            tensors = {name: stream.get_tensor(name) for name in names}
            metadata = stream.metadata() or {}
        if tensors:
            save_file(tensors, fresh / shard.name, metadata={"format": "pt", **metadata})
            kept.update(dict.fromkeys(names, shard.name))
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if (checkpoint / _INDEX).is_file():
        index = read_json(checkpoint / _INDEX)
        metadata = {**index.get("metadata", {}), "total_size": total}
        write_json(fresh / _INDEX, {"metadata": metadata, "weight_map": kept})
    logger.info("%s: %d tensors of the policy kept, %d of LARA left out", checkpoint, len(kept), dropped)


def _merge_lora(checkpoint: Path, fresh: Path, base_model: str | None) -> None:
    import gr00t.model  # noqa: F401  # registers its classes with transformers
    from peft import PeftModel
    from transformers import AutoModel

    source = base_model or read_json(checkpoint / "adapter_config.json").get("base_model_name_or_path")
    if not source:
        raise AdapterFormatError(f"{checkpoint}/adapter_config.json names no base model; pass base_model=")
    merged: Any = PeftModel.from_pretrained(AutoModel.from_pretrained(source), str(checkpoint)).merge_and_unload()
    merged.save_pretrained(fresh)
