"""The files an adapter is made of, on disk and on the Hugging Face Hub.

A folder holds `lara_config.json`, `lara_adapter.safetensors` (projector, step), `lam/` (the latent action model),
`policy_lora/` in peft's own format where the policy carries LoRA, and `README.md`. Never `adapter_config.json`:
transformers takes that name for a peft adapter. safetensors only; nothing in a folder is ever executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from .config import LaraConfig
from .errors import AdapterFormatError
from .files import load_into, locate_folder, read_json, read_tensors, replace_folder, write_json, write_tensors
from .schedules import weight_from_json

if TYPE_CHECKING:
    from .adapter import LaraAdapter

__all__ = ["SavedAdapter", "push_adapter", "read_adapter", "save_adapter"]

CONFIG_FILE = "lara_config.json"
WEIGHTS_FILE = "lara_adapter.safetensors"
LAM_FOLDER = "lam"
LORA_FOLDER = "policy_lora"
CARD_FILE = "README.md"
_COUNTERS = ("step", "direction", "seed")  # buffers of the adapter, saved without their underscore


def save_adapter(adapter: LaraAdapter, folder: str | os.PathLike[str]) -> None:
    """Write an adapter; the folder appears or changes as a whole.

    Under torch.distributed only rank 0 writes. Call it from every rank when the policy is sharded by FSDP2, where the
    tensors are gathered by all; otherwise a call from rank 0 alone works as well.

    Args:
        adapter: attached or detached.
        folder: is created or replaced; files in it that are not ours stay.

    Raises:
        AdapterFormatError: `folder` is a file.
        OSError: the disk is full or not writable; the folder is as before.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    if rank and not any(hasattr(tensor, "full_tensor") for tensor in adapter.state_dict().values()):
        return
    with replace_folder(folder) if rank == 0 else _scratch() as fresh:
        tensors = {f"projector.{name}": tensor for name, tensor in adapter.projector.state_dict().items()}
        tensors |= {name: getattr(adapter, f"_{name}") for name in _COUNTERS}
        write_tensors(fresh / WEIGHTS_FILE, tensors)
        save_lam = getattr(adapter.lam, "save_pretrained", None)
        if callable(save_lam):
            save_lam(fresh / LAM_FOLDER)
        if adapter._peft is not None:
            adapter._peft.save_pretrained(fresh / LORA_FOLDER)
        config = adapter.config.to_dict()
        config["files"] = {WEIGHTS_FILE: _sha256(fresh / WEIGHTS_FILE)}
        write_json(fresh / CONFIG_FILE, config)
        (fresh / CARD_FILE).write_text(_card(adapter.config), encoding="utf-8")


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Where the other ranks of a sharded policy write what rank 0 writes: the gathering needs all of them."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def push_adapter(
    adapter: LaraAdapter, repo_id: str, *, private: bool | None = None, revision: str | None = None,
    commit_message: str = "Upload LARA adapter", token: str | None = None,
) -> str:  # fmt: skip
    """Upload an adapter to the Hugging Face Hub.

    Args:
        adapter: attached or detached.
        repo_id: "user/name"; created if it does not exist.
        private: visibility of a repository that is created.
        revision: branch to commit to; None: the main branch.
        commit_message: of the one commit.
        token: access token; None: the one huggingface_hub finds.

    Returns:
        URL of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        save_adapter(adapter, folder)
        info = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return str(info.commit_url)


@dataclass
class SavedAdapter:
    """A saved adapter, read and checked as far as can be without a policy.

    Attributes:
        source: folder it was read from.
        config: its settings.
        arguments: the arguments of `attach_lara` they amount to, the folder of the LAM among them; None for what was a
            callable or a module.
        tensors: projector and counters.
    """

    source: Path
    config: LaraConfig
    arguments: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def restore(self, adapter: LaraAdapter) -> None:
        """Load the saved tensors into a freshly attached adapter.

        Raises:
            AdapterFormatError: the policy or the LAM has other widths or depth than the saved ones.
        """
        for name, what in (
            ("latent_width", "a LAM of latent width"),
            ("depth", "a policy whose DiT has depth"),
            ("hidden_width", "a policy whose DiT has width"),
        ):
            saved, now = getattr(self.config, name), getattr(adapter.config, name)
            if saved is not None and now is not None and saved != now:
                raise AdapterFormatError(f"{self.source} was saved with {what} {saved}, but here it is {now}")
        tensors = dict(self.tensors)
        counters = {name: tensors.pop(name, None) for name in _COUNTERS}
        if any(t is None or t.shape != getattr(adapter, f"_{name}").shape for name, t in counters.items()):
            raise AdapterFormatError(
                f"{self.source / WEIGHTS_FILE} lacks one of {', '.join(_COUNTERS)}, or it has a wrong shape"
            )
        prefix = "projector."
        foreign = sorted(name for name in tensors if not name.startswith(prefix))
        if foreign:
            raise AdapterFormatError(f"{self.source / WEIGHTS_FILE} holds unexpected tensors {foreign[:5]}")
        load_into(
            adapter.projector,
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
            self.source / WEIGHTS_FILE,
        )
        self._restore_lora(adapter)
        for name, tensor in counters.items():
            getattr(adapter, f"_{name}").copy_(tensor)

    def _restore_lora(self, adapter: LaraAdapter) -> None:
        folder = self.source / LORA_FOLDER
        if not folder.is_dir():
            return
        if adapter._peft is None:
            raise AdapterFormatError(
                f"{self.source} holds LoRA weights of the policy; wrap it first: "
                f"policy = PeftModel.from_pretrained(policy, '{folder}', is_trainable=True), then load_lara(policy, ...)"
            )
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(adapter._peft, read_tensors(folder / "adapter_model.safetensors"))


def read_adapter(repo_or_dir: str | os.PathLike[str], revision: str | None = None) -> SavedAdapter:
    """Read a saved adapter from a folder or the Hub.

    Raises:
        AdapterFormatError: missing, truncated, foreign or newer files; the message names the file.
    """
    patterns = [CONFIG_FILE, WEIGHTS_FILE, f"{LAM_FOLDER}/*", f"{LORA_FOLDER}/*"]
    folder = locate_folder(repo_or_dir, revision, patterns)
    raw = read_json(folder / CONFIG_FILE)
    files = raw.pop("files", {})
    config = LaraConfig.from_dict(raw, str(folder / CONFIG_FILE))
    tensors = read_tensors(folder / WEIGHTS_FILE)
    wanted = files.get(WEIGHTS_FILE) if isinstance(files, dict) else None
    if wanted != _sha256(folder / WEIGHTS_FILE):
        raise AdapterFormatError(
            f"{folder / WEIGHTS_FILE} is not the file that {CONFIG_FILE} was written with (sha256 differs): "
            "the folder was changed or copied in part"
        )
    arguments: dict[str, Any] = {
        "layer": config.layer,
        "blocks": config.blocks if config.policy_family == "generic" else None,
        "frames": config.frames,
        "token": config.token,
        "projector": config.projector,
        "alignment": config.alignment,
        "align_weight": weight_from_json(config.align_weight),
        "lam_weight": weight_from_json(config.lam_weight),
        "lam_grad_scale": config.lam_grad_scale,
        "train_lam": config.train_lam,
        "add_to_loss": config.add_to_loss,
    }
    lam = folder / LAM_FOLDER
    if lam.is_dir():
        arguments["lam"] = lam
    return SavedAdapter(folder, config, arguments, tensors)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(2**20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _card(config: LaraConfig) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="lara-adapter", pipeline_tag="robotics", license="apache-2.0", tags=["lara", "arxiv:2606.07100"]
    )
    rows = "\n".join(
        f"| {name} | `{getattr(config, name)}` |"
        for name in (
            "policy_family", "policy_class", "layer", "depth", "token", "projector", "alignment", "align_weight",
            "lam_weight", "lam_grad_scale", "train_lam", "lara_version",
        )
    )  # fmt: skip
    return f"""---
{data.to_yaml()}
---

# LARA adapter for {config.policy_class}

Projector and latent action model of LARA, Latent Action Representation Alignment
([arXiv 2606.07100](https://arxiv.org/abs/2606.07100)). They serve training only: acting needs none of these files.

| setting | value |
|---|---|
{rows}

```python
from lara_adapter import load_lara

lara = load_lara(policy, "this repository")
```
"""
