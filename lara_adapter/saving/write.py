"""Writing an adapter to a folder or the Hugging Face Hub; reading is in :mod:`lara_adapter.saving.read`."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed as dist

from ..lam.model import LatentActionModel
from ..metrics import History
from ..storage.files import replace_folder, sha256, write_json, write_tensors
from ..storage.sharding import gathered, whole
from . import card, layout, lora, policy_weights
from .layout import CARD_FILE, LAM_FOLDER, Part
from .read import COUNTERS, SavedAdapter, read_adapter, restore_adapter

__all__ = ["SavedAdapter", "finish", "push_adapter", "read_adapter", "restore_adapter", "save_adapter"]

logger = logging.getLogger(__name__)
_UNTRAINED: weakref.WeakSet[Any] = weakref.WeakSet()  # adapters that were warned about


def save_adapter(
    adapter: Any,
    folder: str | os.PathLike[str],
    *,
    save_policy: str | None = None,
    base_model: str | None = None,
    dataset: str | Sequence[str] | None = None,
    license: str | None = None,
    max_shard_size: int | str = "4GB",
) -> None:
    """Write an adapter; the folder appears or changes as a whole.

    Under torch.distributed only rank 0 writes. Call it from every rank when the policy is sharded by FSDP2 or ZeRO-3, since
    all ranks gather the tensors; otherwise a call from rank 0 alone works as well.

    Args:
        adapter: attached or detached.
        folder: created or replaced; files in it that are not ours are kept, and so is your part of a README.md.
        save_policy: "trainable" also writes what was trained of the policy itself (parameters that require a gradient,
            except LoRA, and its persistent buffers); `load_lara` puts it into a base policy. None: only its LoRA.
        base_model: Hub id of the policy, for the model card; None: from the policy's configuration, if it has one.
        dataset: Hub id or name of the training data, or several, for the model card.
        license: of the weights, as the Hub writes it ("apache-2.0"), for the model card.
        max_shard_size: of the policy's weights: bytes of one file, or "4GB".

    Raises:
        LaraArgumentError: unknown `save_policy`, or "trainable" with a policy sharded by FSDP1.
        AdapterFormatError: `folder` is a file.
        OSError: the disk is full or not writable; the folder is as before. With a sharded policy every rank raises the
            error of rank 0.
    """
    _write(adapter, folder, save_policy, max_shard_size, base_model=base_model, dataset=dataset, license=license)


def _write(
    adapter: Any, folder: str | os.PathLike[str], save_policy: str | None = None,
    max_shard_size: int | str = "4GB", **metadata: Any,
) -> card.Facts:  # fmt: skip
    """See :func:`save_adapter`; returns what the model card was made from."""
    policy_weights.check_choice(save_policy)
    facts = card.Facts.from_adapter(adapter, **metadata)
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    if rank == 0:
        _warn_of_untrained(adapter)
    parts = _gather_parts(adapter, save_policy, max_shard_size)
    if not _is_sharded(adapter):
        if rank == 0:
            _write_parts(parts, folder, facts, adapter.history)
        return facts
    error: Exception | None = None
    try:
        if rank == 0:
            _write_parts(parts, folder, facts, adapter.history)
    except Exception as caught:
        error = caught
    # The other ranks only gather. So does rank 0 after an error of its disk: they would wait for it.
    try:
        for _ in parts:
            pass
    except Exception as caught:
        error = error or caught
    failed: list[str | None] = [None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(failed, src=0)
    if error is not None:
        raise error
    if failed[0] is not None:
        raise OSError(f"rank 0 could not save the adapter: {failed[0]}")
    return facts


def _warn_of_untrained(adapter: Any) -> None:
    """Warn once where LARA took no part in a training; whoever set both weights to 0 knows."""
    if adapter.step or adapter.restored or adapter._idle or adapter in _UNTRAINED:
        return
    _UNTRAINED.add(adapter)
    logger.warning(
        "this adapter is saved without one training step of LARA: projector and LAM are as they were attached. If the "
        "policy was trained, its loop went past LARA: it calls another method than %r (attach_lara(entry=...)), the policy "
        "was in eval mode, or the forward ran under no_grad or lara.disabled()",
        adapter.spec.entry,
    )


def _gather_parts(adapter: Any, save_policy: str | None, max_shard_size: int | str) -> Iterator[Part]:
    """Gather one part of an adapter after the other; of a sharded one every rank must run this to its end."""
    with gathered(adapter.projector):
        tensors = {f"projector.{name}": whole(tensor) for name, tensor in adapter.projector.state_dict().items()}
        tensors |= {name: whole(getattr(adapter, f"_{name}")) for name in COUNTERS}
        yield layout.WEIGHTS_FILE, partial(write_tensors, tensors=tensors)
    lam: Any = adapter.lam
    if isinstance(lam, LatentActionModel):
        with gathered(lam):
            state = {name: whole(tensor) for name, tensor in lam.state_dict().items()}
            yield LAM_FOLDER, partial(lam.save_pretrained, state_dict=state)  # within `gathered`: the state is no copy
    elif callable(getattr(lam, "save_pretrained", None)):
        with tempfile.TemporaryDirectory() as scratch:
            lam.save_pretrained(Path(scratch) / LAM_FOLDER)  # a user's own may gather too: every rank calls it
            yield LAM_FOLDER, partial(shutil.copytree, Path(scratch) / LAM_FOLDER)
    if adapter.binding.peft is not None:
        yield from lora.gather_parts(adapter.binding.peft)
    if save_policy is not None:
        yield from policy_weights.gather_parts(adapter.policy, max_shard_size)


def _write_parts(parts: Iterator[Part], folder: str | os.PathLike[str], facts: card.Facts, history: History) -> None:
    with replace_folder(folder, ours=layout.TOP_LEVEL) as fresh:
        for name, write in parts:
            write(fresh / name)
        facts.lora = (fresh / layout.LORA_WEIGHTS).is_file()
        facts.policy = (fresh / layout.POLICY_INDEX).is_file()
        finish(fresh, folder, facts, history)


def finish(fresh: Path, folder: str | os.PathLike[str], facts: card.Facts, history: History) -> None:
    """Write what describes an adapter's other files: the settings with the sha256 of each, the picture, the model card.

    Args:
        fresh: the new folder, with all other files in it.
        folder: what it will replace, where a card of the user's may be.
        facts: for the card; `facts.curve` is set.
        history: of the training, for the picture.
    """
    files = {p.relative_to(fresh).as_posix(): sha256(p) for p in sorted(fresh.rglob("*")) if p.is_file()}
    write_json(fresh / layout.CONFIG_FILE, {**facts.config.to_dict(), "files": files})
    facts.curve = card.draw_curve(history, fresh / layout.CURVE_FILE)
    (fresh / CARD_FILE).write_text(card.render(facts, card.read_card(Path(folder) / CARD_FILE)), encoding="utf-8")


def _is_sharded(adapter: Any) -> bool:
    """Whether some tensors are spread over ranks: FSDP2 (DTensor) or ZeRO-3."""
    modules = (adapter, adapter.policy)
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return any(hasattr(t, "full_tensor") or hasattr(t, "ds_id") for t in tensors)


def push_adapter(
    adapter: Any, repo_id: str, *, private: bool | None = None, revision: str | None = None,
    commit_message: str = "Upload LARA adapter", token: str | None = None, **content: Any,
) -> str:  # fmt: skip
    """Upload an adapter to the Hugging Face Hub, in one commit.

    An adapter in the repository is replaced: its files that this version does not have are deleted, other files stay.
    After a failure the upload is there completely or not at all; the next call does not send files twice. Under
    torch.distributed call it as :func:`save_adapter`; rank 0 uploads.

    Args:
        adapter: attached or detached.
        repo_id: "user/name"; created if it does not exist.
        private: visibility of a new repository; None: the default of its owner.
        revision: branch to commit to, created from main if it does not exist, or an open pull request, "refs/pr/1"; None:
            the main branch.
        commit_message: of the commit.
        token: access token; None: the one huggingface_hub finds.
        **content: `save_policy`, `base_model`, `dataset`, `license`, `max_shard_size`; see :func:`save_adapter`.

    Returns:
        URL of the commit; it ends in the hash that `load_lara(..., revision=)` takes. Empty on ranks other than 0.

    Raises:
        LaraArgumentError: `repo_id` is not an id, or `revision` is a commit.
        HubError: the Hub cannot be reached, or does not accept the upload.
    """
    from ..storage.hub import check_target, push_folder

    check_target(repo_id, revision)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        facts = _write(adapter, folder, **content)
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return ""
        return push_folder(
            folder, repo_id, layout.OURS, private=private, revision=revision, message=commit_message, token=token,
            card=lambda old: card.render(facts, old, repo_id),
        )  # fmt: skip
