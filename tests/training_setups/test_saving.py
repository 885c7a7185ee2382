"""Saving on several ranks, and killed at every step of a save."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.models import FixedDit, build
from helpers.ranks import run_ranks
from helpers.toys import DitPolicy, make_batch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lara_adapter import load_lara

TORCH = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())


def _step(model, policy, rank):
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    model(make_batch(seed=rank))["loss"].backward()
    optimizer.step()


def _whole(policy):
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in policy.state_dict().items()
        if not name.startswith("lara.")
    }


def _compare(folder, state):
    acting = load_lara(FixedDit(), folder, inference=True).state_dict()
    changed = any(not torch.equal(value, FixedDit().state_dict()[name]) for name, value in acting.items())
    return changed and acting.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in acting.items())


def _ddp(rank, folder, all_ranks):
    policy, lara = build("output", lam="tiny")
    _step(DistributedDataParallel(policy), policy, rank)
    if all_ranks or rank == 0:
        lara.save_pretrained(folder, save_policy="trainable")
    dist.barrier()
    return _compare(folder, _whole(policy))


@pytest.mark.parametrize("all_ranks", [True, False])
def test_trained_weights_under_ddp(tmp_path, all_ranks):
    assert run_ranks(_ddp, str(tmp_path / "a"), all_ranks) == [True, True]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def _fsdp(rank, folder, blocks_alone):
    from torch.distributed.fsdp import fully_shard

    policy, lara = build("output", lam="tiny")
    for block in policy.transformer_blocks:
        fully_shard(block)
    if not blocks_alone:
        for unit in lara.fsdp_units():
            fully_shard(unit)
        fully_shard(policy)
        _step(policy, policy, rank)
    else:  # the policy is sharded in part, LARA not at all: still a collective
        with torch.no_grad():
            policy.action_in.weight.add_(1)
    lara.save_pretrained(folder, save_policy="trainable", max_shard_size=4000)
    dist.barrier()
    return _compare(folder, _whole(policy))


@pytest.mark.skipif(TORCH < (2, 11), reason="FSDP2 is supported from torch 2.11 on")
@pytest.mark.parametrize("blocks_alone", [False, True])
def test_trained_weights_under_fsdp2_are_gathered_by_all_and_written_once(tmp_path, blocks_alone):
    assert run_ranks(_fsdp, str(tmp_path / "a"), blocks_alone) == [True, True]
    assert len(list((tmp_path / "a" / "policy_weights").glob("*.safetensors"))) > 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def _fsdp_full_disk(rank, folder, where):
    """What each rank is told when only rank 0 cannot write; then a save that goes well, by the same ranks."""
    from torch.distributed.fsdp import fully_shard

    from lara_adapter.storage import files

    policy, lara = build("output", lam="tiny")
    for block in policy.transformer_blocks:
        fully_shard(block)
    for unit in lara.fsdp_units():
        fully_shard(unit)
    fully_shard(policy)
    real, written = files.save_file, []

    def full(tensors, path, **options):
        written.append(path)
        if rank == 0 and len(written) == where:
            raise OSError(28, "No space left on device")
        real(tensors, path, **options)

    target = Path(folder) / "a"
    if where == 0:  # a file stands where the folder is to be
        if rank == 0:
            target.write_text("in the way")
        dist.barrier()
    files.save_file = full
    try:
        lara.save_pretrained(target, save_policy="trainable", max_shard_size=4000)
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        files.save_file = real
    dist.barrier()
    left = sorted(path.name for path in Path(folder).iterdir())
    dist.barrier()
    lara.save_pretrained(Path(folder) / "b", save_policy="trainable", max_shard_size=4000)
    dist.barrier()
    return said, left, len(written), _compare(Path(folder) / "b", _whole(policy))


@pytest.mark.skipif(TORCH < (2, 11), reason="FSDP2 is supported from torch 2.11 on")
@pytest.mark.parametrize("where", [0, 1, 2, 3, 5])  # the folder; projector, LAM, first and later shards of the policy
def test_when_rank_0_cannot_write_no_rank_waits_for_it(tmp_path, where):
    (first, left, attempts, good), (other, _, on_others, good_there) = run_ranks(_fsdp_full_disk, str(tmp_path), where)
    assert ("is a file" if where == 0 else "No space left") in first
    assert other.startswith("OSError: rank 0 could not save the adapter: ")
    assert first in other  # with the reason
    assert left == (["a"] if where == 0 else [])
    assert attempts == where  # after the first failure nothing is tried
    assert on_others == 0  # the other ranks write nothing
    assert good
    assert good_there


def _fsdp_lora(rank, folder):
    import peft
    from torch.distributed.fsdp import fully_shard

    from lara_adapter import attach_lara

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["mlp.0"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(FixedDit(), config).train()
    policy = wrapped.get_base_model()
    from helpers.toys import OwnLam

    lara = attach_lara(wrapped, OwnLam())
    whole = {n: p.detach().clone() for n, p in policy.named_parameters() if "lora_" in n}
    for block in policy.transformer_blocks:
        fully_shard(block)
    fully_shard(policy)
    lara.save_pretrained(folder)
    dist.barrier()
    acting = load_lara(FixedDit(), folder, inference=True)
    found = dict(acting.named_parameters())
    return bool(whole) and all(torch.equal(found[name], value) for name, value in whole.items())


@pytest.mark.skipif(TORCH < (2, 11), reason="FSDP2 is supported from torch 2.11 on")
def test_lora_under_fsdp2(tmp_path):
    pytest.importorskip("peft")
    assert run_ranks(_fsdp_lora, str(tmp_path / "a")) == [True, True]


def _save_and_die(lara, folder, at):
    """In a child: save, and be killed (SIGKILL) at the `at`-th step that touches the disk."""
    from lara_adapter.storage import files

    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    files._sync = counted(files._sync)
    files.exchange = counted(files.exchange)
    files.shutil.rmtree = counted(files.shutil.rmtree)
    files.save_file = counted(files.save_file)
    files.os.replace = counted(files.os.replace)
    lara.save_pretrained(folder, save_policy="trainable")
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("swaps", [True, False])
def test_killed_at_every_step_of_a_save_the_old_adapter_or_the_new_one_is_whole(tmp_path, monkeypatch, swaps):
    """`swaps=False`: where folders cannot be exchanged there is one moment without; an error then names the old one."""
    from lara_adapter.storage import files

    if not swaps:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    elif not _can_exchange(tmp_path):
        pytest.skip("this disk cannot exchange folders")
    _, lara = build("output")
    folder = tmp_path / "a"
    lara.step = 1
    lara.save_pretrained(folder, save_policy="trainable")
    lara.step = 2
    seen, gaps = set(), 0
    for at in range(1, 60):
        child = os.fork()
        if child == 0:
            _save_and_die(lara, folder, at)
        _, status = os.waitpid(child, 0)
        if not folder.exists():
            gaps += 1
            (old,) = (path for path in tmp_path.glob(".a.old-*") if any(path.iterdir()))
            with pytest.raises(Exception, match=r"does not exist|an interrupted save left"):
                load_lara(DitPolicy(), folder, lam=lara.lam)
            old.rename(folder)
        for litter in tmp_path.glob(".a.*"):
            shutil.rmtree(litter)
        seen.add(_saved_step(folder))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        if _saved_step(folder) == 2:  # begin anew from the old one
            lara.step = 1
            lara.save_pretrained(folder, save_policy="trainable")
            lara.step = 2
    assert os.WIFEXITED(status), "it never came to the end"
    assert at > 12
    assert seen == {1, 2}
    assert gaps == 0 if swaps else gaps >= 1


def _saved_step(folder: Path) -> int:
    from helpers.toys import OwnLam

    from lara_adapter.saving.read import read_adapter

    saved = read_adapter(folder)
    assert saved.has_policy
    load_lara(FixedDit(), folder, lam=OwnLam())
    return int(saved.tensors["step"])


def _can_exchange(folder: Path) -> bool:
    from lara_adapter.storage.files import exchange

    for name in ("x", "y"):
        (folder / name).mkdir()
    possible = exchange(folder / "x", folder / "y")
    for name in ("x", "y"):
        (folder / name).rmdir()
    return possible
