"""The files an adapter is made of, on disk and on the Hugging Face Hub.

A folder holds `lara_config.json` (settings, and the sha256 of each other file), `lara_adapter.safetensors` (projector,
step), `lam/` (the latent action model), `policy_lora/` in peft's own format where the policy carries LoRA,
`policy_weights/` where its trained weights were asked for, and `README.md` with a picture of the training. Never
`adapter_config.json`: transformers takes that name for a peft adapter. safetensors only; nothing in a folder is ever
executed. Reading is in :mod:`lara_adapter.saving.read`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed as dist

from ..lam.model import LatentActionModel
from ..storage.files import replace_folder, sha256, write_json, write_tensors
from ..storage.sharding import gathered, whole
from . import card, lora, policy_weights
from .layout import CARD_FILE, CONFIG_FILE, CURVE_FILE, LAM_FOLDER, OURS, TOP_LEVEL, WEIGHTS_FILE
from .read import COUNTERS, SavedAdapter, read_adapter, restore_adapter

if TYPE_CHECKING:
    from ..adapter import LaraAdapter
    from ..metrics import History

__all__ = ["SavedAdapter", "finish", "push_adapter", "read_adapter", "restore_adapter", "save_adapter"]


def save_adapter(
    adapter: LaraAdapter,
    folder: str | os.PathLike[str],
    *,
    save_policy: str | None = None,
    base_model: str | None = None,
    dataset: str | Sequence[str] | None = None,
    license: str | None = None,
    max_shard_size: int | str = "4GB",
) -> None:
    """Write an adapter; the folder appears or changes as a whole.

    Under torch.distributed only rank 0 writes. Call it from every rank when the policy is sharded by FSDP2 or ZeRO-3, where
    the tensors are gathered by all; otherwise a call from rank 0 alone works as well.

    Args:
        adapter: attached or detached.
        folder: is created or replaced; files in it that are not ours stay, and of a README.md what you wrote.
        save_policy: "trainable" also writes what was trained of the policy itself (parameters that require a gradient, LoRA
            aside, and its persistent buffers), to which `load_lara` then sets a base policy. None: nothing of it but LoRA.
        base_model: Hub id of the policy it was attached to, for the model card; None: as far as the policy tells.
        dataset: Hub id or name of what it was trained on, or several, for the model card.
        license: of the weights, as the Hub writes it ("apache-2.0"), for the model card.
        max_shard_size: of the policy's weights: bytes of one file, or "4GB".

    Raises:
        LaraArgumentError: an unknown `save_policy`, or trainable weights are asked of a policy sharded by FSDP1.
        AdapterFormatError: `folder` is a file.
        OSError: the disk is full or not writable; the folder is as before. Of a sharded policy every rank raises what
            went wrong on rank 0.
    """
    _write(adapter, folder, save_policy, max_shard_size, base_model=base_model, dataset=dataset, license=license)


def _write(
    adapter: LaraAdapter, folder: str | os.PathLike[str], save_policy: str | None = None,
    max_shard_size: int | str = "4GB", **told: Any,
) -> card.Facts:  # fmt: skip
    """See :func:`save_adapter`; returns what the model card was made from."""
    policy_weights.check_choice(save_policy)
    facts = card.Facts.of(adapter, **{"base_model": None, "dataset": None, "license": None, **told})
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    if not _is_sharded(adapter):
        if rank == 0:
            with replace_folder(folder, ours=TOP_LEVEL) as fresh:
                _fill(adapter, fresh, folder, facts, save_policy, max_shard_size, _now)
        return facts
    # The other ranks take part in the gathering and write nothing. What goes wrong with the disk of rank 0 must not keep
    # it from the rest of the gathering, where they would wait for it: it is raised in the end, and by all.
    later = _Later(rank == 0)
    try:
        with contextlib.ExitStack() as stack:
            fresh = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if rank == 0:
                try:
                    fresh = stack.enter_context(replace_folder(folder, ours=TOP_LEVEL))
                except Exception as error:
                    later.error = error
            _fill(adapter, fresh, folder, facts, save_policy, max_shard_size, later)
            later.settle()
    except Exception as error:
        later.error = error
    failed: list[str | None] = [None if later.error is None else f"{type(later.error).__name__}: {later.error}"]
    dist.broadcast_object_list(failed, src=0)
    if later.error is not None:
        raise later.error
    if failed[0] is not None:
        raise OSError(f"rank 0 could not save the adapter: {failed[0]}")
    return facts


def _now(step: Callable[[], Any]) -> None:
    """Do what touches the disk."""
    step()


class _Later:
    """Does what touches the disk where `writes`, unless something went wrong before; keeps the first error."""

    def __init__(self, writes: bool) -> None:
        self.writes = writes
        self.error: Exception | None = None

    def __call__(self, step: Callable[[], Any]) -> None:
        if self.writes and self.error is None:
            try:
                step()
            except Exception as error:
                self.error = error

    def settle(self) -> None:
        """Raise what was kept."""
        if self.error is not None:
            raise self.error


def _fill(
    adapter: LaraAdapter, fresh: Path, folder: str | os.PathLike[str], facts: card.Facts, save_policy: str | None,
    max_shard_size: int | str, write: Callable[[Callable[[], Any]], None],
) -> None:  # fmt: skip
    """Gather each part, and hand what writes it to `write`."""
    with gathered(adapter.projector):
        tensors = {f"projector.{name}": whole(tensor) for name, tensor in adapter.projector.state_dict().items()}
        tensors |= {name: whole(getattr(adapter, f"_{name}")) for name in COUNTERS}
        write(lambda: write_tensors(fresh / WEIGHTS_FILE, tensors))
    lam: Any = adapter.lam
    if isinstance(lam, LatentActionModel):
        with gathered(lam):
            state = {name: whole(tensor) for name, tensor in lam.state_dict().items()}
            write(lambda: lam.save_pretrained(fresh / LAM_FOLDER, state_dict=state))  # while it is gathered: no copies
    elif callable(getattr(lam, "save_pretrained", None)):
        lam.save_pretrained(fresh / LAM_FOLDER)  # a user's own may gather too, so that every rank calls it
    if adapter.binding.peft is not None:
        facts.lora = lora.save(fresh, adapter.binding.peft, write=write)
    if save_policy is not None:
        policy_weights.save(fresh, adapter.policy, write=write, max_shard_size=max_shard_size)
        facts.policy = True
    write(lambda: finish(fresh, folder, facts, adapter.history))


def finish(fresh: Path, folder: str | os.PathLike[str], facts: card.Facts, history: History) -> None:
    """Write what speaks of an adapter's other files: the settings with the sha256 of each, the picture, the model card.

    Args:
        fresh: the folder under way, with all other files in it.
        folder: what it will replace, where a card of the user's may stand.
        facts: for the card, the settings among them; whether there is a picture is noted in it.
        history: of the training, for the picture.
    """
    files = {p.relative_to(fresh).as_posix(): sha256(p) for p in sorted(fresh.rglob("*")) if p.is_file()}
    write_json(fresh / CONFIG_FILE, {**facts.config.to_dict(), "files": files})
    facts.curve = card.draw_curve(history, fresh / CURVE_FILE)
    (fresh / CARD_FILE).write_text(card.render(facts, card.existing(Path(folder) / CARD_FILE)), encoding="utf-8")


def _is_sharded(adapter: LaraAdapter) -> bool:
    """Whether no rank has the whole of a tensor: FSDP2 (DTensor) or ZeRO-3."""
    modules = (adapter, adapter.policy)
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return any(hasattr(t, "full_tensor") or hasattr(t, "ds_id") for t in tensors)


def push_adapter(
    adapter: LaraAdapter, repo_id: str, *, private: bool | None = None, revision: str | None = None,
    commit_message: str = "Upload LARA adapter", token: str | None = None, **content: Any,
) -> str:  # fmt: skip
    """Upload an adapter to the Hugging Face Hub, in one commit.

    Where there is one already it is replaced: files that this version no longer has are deleted, those of others stay.
    After a failure it is there whole or not at all; call it again, and files that were uploaded are not sent twice. Under
    torch.distributed call it as :func:`save_adapter`; rank 0 uploads.

    Args:
        adapter: attached or detached.
        repo_id: "user/name"; created if it does not exist.
        private: visibility of a repository that is created; None: what its owner's default is.
        revision: branch to commit to, created from main if it does not exist, or an open pull request, "refs/pr/1"; None:
            the main branch.
        commit_message: of the one commit.
        token: access token; None: the one huggingface_hub finds.
        **content: `save_policy`, `base_model`, `dataset`, `license`, `max_shard_size`; see :func:`save_adapter`.

    Returns:
        URL of the commit, which ends in its hash: what `load_lara(..., revision=)` takes. Empty on other ranks than 0.

    Raises:
        LaraArgumentError: `repo_id` is no id, or `revision` is a commit.
        HubError: the Hub cannot be reached, or does not accept the upload; the message says why.
    """
    from ..storage.hub import check_target, push_folder

    check_target(repo_id, revision)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        facts = _write(adapter, folder, **content)
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return ""
        return push_folder(
            folder, repo_id, OURS, private=private, revision=revision, message=commit_message, token=token,
            card=lambda old: card.render(facts, old, repo_id),
        )  # fmt: skip
