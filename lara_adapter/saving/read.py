"""Reading a saved adapter: every file is checked before it is used, and nothing is executed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import LaraConfig
from ..errors import AdapterFormatError
from ..policies import unwrapped
from ..storage.files import check_values, load_into, missing, read_json, read_tensors, sha256
from ..storage.hub import locate_folder
from ..storage.origins import origins_of, warn_of_others
from ..storage.untrusted import check_tensor_file, safe_path, short
from . import lora, policy_weights
from .layout import ACTING, CONFIG_FILE, LAM_FOLDER, LORA_FOLDER, POLICY_FOLDER, TRAINING, WEIGHTS_FILE

__all__ = ["COUNTERS", "SavedAdapter", "read_adapter", "restore_adapter"]

logger = logging.getLogger(__name__)

COUNTERS = ("step", "direction", "seed")  # buffers of the adapter, saved without their underscore
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass
class SavedAdapter:
    """A saved adapter, read and checked as far as possible without a policy.

    Attributes:
        source: folder it was read from.
        config: its settings.
        arguments: of `attach_lara`, with the folder of the LAM; None for what was a callable or a module.
        tensors: projector and counters; empty if it was read to act.
        has_lora: whether LoRA of the policy is in it.
        has_policy: whether trained weights of the policy are in it.
    """

    source: Path
    config: LaraConfig
    arguments: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    has_lora: bool = False
    has_policy: bool = False

    def restore(self, adapter: Any) -> None:
        """Load the saved tensors into a freshly attached adapter and its policy.

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
        path = self.source / WEIGHTS_FILE
        tensors = dict(self.tensors)
        counters = {name: tensors.pop(name, None) for name in COUNTERS}
        for name, tensor in counters.items():
            own = getattr(adapter, f"_{name}")
            if tensor is None or tensor.shape != own.shape:
                raise AdapterFormatError(f"{path} lacks one of {', '.join(COUNTERS)}, or it has a wrong shape")
            check_values(path, name, own, tensor)
        prefix = "projector."
        foreign = sorted(name for name in tensors if not name.startswith(prefix))
        if foreign:
            raise AdapterFormatError(f"{path} holds unexpected tensors {foreign[:5]}")
        if self.has_lora and adapter.binding.peft is None:
            raise AdapterFormatError(
                f"{self.source} holds LoRA weights of the policy; wrap it first: policy = PeftModel.from_pretrained("
                f"policy, '{self.source / LORA_FOLDER}', is_trainable=True), then load_lara(policy, ...). To act: "
                "load_lara(policy, ..., inference=True)"
            )
        if self.has_policy:
            policy_weights.restore(self.source, adapter.policy, dry=True)  # before anything changes
        load_into(adapter.projector, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, path)
        if self.has_lora:
            lora.settings(self.source)
            lora.restore(adapter.binding.peft, self.source)
        if self.has_policy:
            policy_weights.restore(self.source, adapter.policy)
        for name, tensor in counters.items():
            getattr(adapter, f"_{name}").copy_(tensor)
        adapter.restored = True

    def act(self, policy: nn.Module, *, merge: bool) -> nn.Module:
        """Turn a base policy into the post-trained one, in eval mode, without LARA; `merge` its LoRA into the weights.

        Raises:
            AdapterFormatError: nothing of the policy was saved, or it does not fit this one.
            HostNotInstalled: there is LoRA, and peft is missing.
        """
        if not (self.has_lora or self.has_policy):
            raise AdapterFormatError(
                f"{self.source} has no weights of the policy (no {LORA_FOLDER}/, no {POLICY_FOLDER}/): to act, load the "
                "policy alone. Without LoRA, its weights are saved by lara.save_pretrained(..., save_policy='trainable') "
                "or by the policy's own library"
            )
        bare = unwrapped(policy)
        if type(bare).__name__ != self.config.policy_class:
            names = (self.source, self.config.policy_class, type(bare).__name__)
            logger.warning("%s was saved from a %s, but is loaded into a %s", *names)
        warn_of_others(self.config.origins, origins_of(bare, nn.Identity()))
        if self.has_policy:
            policy_weights.restore(self.source, bare, dry=True)  # before anything changes
        # the weights before the merge: the LoRA was trained on top of them
        with lora.applied(policy, self.source, merge=merge) if self.has_lora else contextlib.nullcontext():
            if self.has_policy:
                policy_weights.restore(self.source, bare)
        return (bare if self.has_lora and merge else policy).eval()


def read_adapter(
    repo_or_dir: str | os.PathLike[str], revision: str | None = None, *, acting: bool = False
) -> SavedAdapter:
    """Read a saved adapter from a folder or the Hub.

    Args:
        repo_or_dir: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        acting: read and download only what a policy needs to act.

    Raises:
        AdapterFormatError: missing, truncated, changed, foreign or newer files, or links out of the folder; the message
            names the file.
        HubError: the repository cannot be reached, found or read.
    """
    folder = locate_folder(repo_or_dir, revision, ACTING if acting else TRAINING)
    path = safe_path(folder, CONFIG_FILE)
    raw = read_json(path)
    files = raw.pop("files", None)
    config = LaraConfig.from_dict(raw, str(path))
    arguments = config.arguments(str(path))
    table = _table(folder, files)
    folders = [LORA_FOLDER, POLICY_FOLDER] + ([] if acting else [LAM_FOLDER])
    listed = {name: [file for file in table if file.startswith(f"{name}/")] for name in folders}
    for name in folders:
        if not listed[name] and (folder / name).exists():
            raise AdapterFormatError(f"{folder / name} is not among the files of {CONFIG_FILE}: it was added later")
    _verify(folder, table, ([] if acting else [WEIGHTS_FILE]) + [file for name in folders for file in listed[name]])
    if listed.get(LAM_FOLDER):
        arguments["lam"] = folder / LAM_FOLDER
    tensors = {} if acting else read_tensors(folder / WEIGHTS_FILE)
    return SavedAdapter(folder, config, arguments, tensors, bool(listed[LORA_FOLDER]), bool(listed[POLICY_FOLDER]))


def _table(folder: Path, files: Any) -> dict[str, str]:
    """The table of file to sha256, with its names and values checked."""
    source = folder / CONFIG_FILE
    if not isinstance(files, dict):
        raise AdapterFormatError(f"{source}: files is {short(files)}, but a table of file to sha256 is expected")
    for name, digest in files.items():
        safe_path(folder, name)
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise AdapterFormatError(f"{source}: the sha256 of {short(name)} is {short(digest)}")
    return files


def _verify(folder: Path, table: dict[str, str], names: list[str]) -> None:
    """Check that each file exists, is what its header says, and is the one that was saved."""
    for name in names:
        path = safe_path(folder, name)
        if not path.is_file():
            raise missing(path)
        if path.suffix == ".safetensors":
            check_tensor_file(path)
        if table.get(name) != sha256(path):
            raise AdapterFormatError(
                f"{path} is not the file that was saved with {CONFIG_FILE} (sha256 differs): the folder was changed or not "
                "copied completely"
            )


def restore_adapter(adapter: Any, folder: str | os.PathLike[str]) -> None:
    """Load the tensors of a saved adapter, including its LAM's, into an attached one, to resume a training program.

    Args:
        adapter: attached like the saved one; keeps its settings.
        folder: what :func:`lara_adapter.saving.write.save_adapter` wrote.

    Raises:
        AdapterFormatError: the folder is damaged, or does not fit this policy or LAM.
    """
    saved = read_adapter(folder)
    saved.restore(adapter)
    lam = saved.source / LAM_FOLDER / "model.safetensors"
    if lam.is_file():
        load_into(adapter.lam, read_tensors(lam), lam)
    elif adapter.config.train_lam:
        raise AdapterFormatError(
            f"{saved.source} does not have a latent action model, but the LAM was trained: the run cannot be resumed"
        )
