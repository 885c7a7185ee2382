"""Two gloo ranks: DDP in every flavour, accumulation, ranks without a valid pair, equal codebooks, FSDP2."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers.models import TINY, FixedDit, build
from helpers.ranks import RankError, run_ranks
from helpers.toys import OwnLam, gradients, make_batch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara

TORCH = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())


def _mean_of_single_process(kind, arguments, batches):
    """The mean over ranks of the gradients each rank's batch gives in one process."""
    collected = []
    for batch in batches:
        policy, _ = build(kind, **arguments)
        policy(batch)["loss"].backward()
        collected.append(gradients(policy))
    return {n: sum(c[n] for c in collected) / len(collected) for n in collected[0] if collected[0][n] is not None}


def _ddp(rank, kind, flags, arguments, valid):
    policy, lara = build(kind, **arguments)
    model = DistributedDataParallel(policy, **flags)
    batches = [make_batch(seed=r) for r in range(2)]
    for r, batch in enumerate(batches):
        batch["lara_frames_valid"] = torch.full((4,), valid[r])
    for _ in range(3):  # a parameter left out of one step fails in the next
        policy.zero_grad()
        loss = model(batches[rank])["loss"]
        loss.backward()
    found = gradients(policy)
    return {n: g for n, g in found.items() if g is not None}, lara.metrics()["align_loss"]


FLAVOURS = [
    {"find_unused_parameters": False},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"find_unused_parameters": True, "static_graph": True},
]


@pytest.mark.parametrize("flags", FLAVOURS, ids=lambda f: "+".join(f"{k}={v}" for k, v in f.items()))
@pytest.mark.parametrize("kind", ["output", "norm"])
def test_ddp_gradients_are_the_mean_over_ranks(kind, flags):
    results = run_ranks(_ddp, kind, flags, {}, (True, True))
    expected = _mean_of_single_process(kind, {}, [make_batch(seed=r) for r in range(2)])
    for found, _ in results:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, atol=1e-6), name


def _with_video(policy, model, rank):
    """Demonstrations with their loss, then video with LARA's alone: two forwards, one backward."""
    policy.zero_grad()
    loss = model(make_batch(seed=rank))["loss"]
    model(make_batch(seed=10 + rank))
    (loss + policy.lara.losses.total).backward()
    return {n: g for n, g in gradients(policy).items() if g is not None}


def _video_on_ranks(rank, flags):
    policy, _ = build("output")
    model = DistributedDataParallel(policy, **flags)
    return [_with_video(policy, model, rank) for _ in range(3)][-1]


@pytest.mark.parametrize("flags", FLAVOURS[:3], ids=lambda f: "+".join(f"{k}={v}" for k, v in f.items()))
def test_video_without_actions_beside_demonstrations(flags):
    alone = [_with_video(policy, policy, rank) for rank in range(2) for policy, _ in [build("output")]]
    for found in run_ranks(_video_on_ranks, flags):
        assert found.keys() == alone[0].keys()
        for name in found:
            assert torch.allclose(found[name], (alone[0][name] + alone[1][name]) / 2, atol=1e-6), name


@pytest.mark.parametrize("flags", FLAVOURS[:3], ids=lambda f: "+".join(f"{k}={v}" for k, v in f.items()))
@pytest.mark.parametrize("lam", ["own", "tiny"])
def test_a_rank_without_a_valid_pair_neither_hangs_nor_diverges(flags, lam):
    (first, _), (second, align) = run_ranks(_ddp, "output", flags, {"lam": lam}, (True, False))
    assert align == 0
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def _accumulate(rank):
    policy, _ = build("output")
    model = DistributedDataParallel(policy)
    batches = [make_batch(seed=10 * rank + i) for i in range(3)]
    with model.no_sync():
        for batch in batches[:-1]:
            (model(batch)["loss"] / 3).backward()
    (model(batches[-1])["loss"] / 3).backward()
    return {n: g for n, g in gradients(policy).items() if g is not None}


def test_no_sync_accumulation():
    found = run_ranks(_accumulate)
    everything = _mean_of_single_process(
        "output", {}, [make_batch(seed=10 * r + i) for r in range(2) for i in range(3)]
    )
    for result in found:
        for name, gradient in everything.items():
            assert torch.allclose(result[name], gradient, atol=1e-6), name


def _train(rank, steps, alignment):
    policy, lara = build("output", lam="tiny", alignment=alignment)
    lam = lara.lam
    model = DistributedDataParallel(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    first = {k: v.clone() for k, v in lam.state_dict().items() if k.startswith("quantizer")}
    for step in range(steps):
        optimizer.zero_grad()
        model(make_batch(size=8, seed=100 * rank + step))["loss"].backward()
        optimizer.step()
    changed = [k for k, v in lam.state_dict().items() if k in first and not torch.equal(v, first[k])]
    return {k: v.clone() for k, v in policy.state_dict().items()}, changed


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
def test_codebook_and_projector_are_equal_on_all_ranks_revival_included(alignment):
    """55 steps cover the end of the warm-up (step 2), initialisation from data and a revival (every 50)."""
    (one, changed), (two, _) = run_ranks(_train, 55, alignment)
    assert len(changed) >= 2, "the codebook or its statistics never changed: the test would prove nothing"
    for name in one.keys() - {"lara._direction"}:  # that one is a monitor of the rank's own batches
        assert torch.equal(one[name], two[name]), name


def _contrastive(rank, sizes):
    """The contrastive loss of an unevenly split batch, gathered over ranks."""
    from lara_adapter import Contrastive

    p, z, valid = (t.chunk(1)[0] for t in _samples())
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    own_p, own_z = p[rows].clone().requires_grad_(), z[rows].clone().requires_grad_()
    loss = Contrastive()(own_p, own_z, valid[rows])
    loss[valid[rows]].sum().backward()
    return loss.detach(), own_p.grad, own_z.grad


def _samples():
    g = torch.Generator().manual_seed(3)
    valid = torch.tensor([True, True, False, True, True, True, True])
    return torch.randn(7, 5, generator=g), torch.randn(7, 5, generator=g), valid


@pytest.mark.parametrize("sizes", [(4, 3), (6, 1)])
def test_contrastive_takes_its_negatives_from_all_ranks_with_exact_gradients(sizes):
    from lara_adapter import Contrastive

    p, z, valid = _samples()
    p, z = p.requires_grad_(), z.requires_grad_()
    loss = Contrastive()(p, z, valid)
    loss[valid].sum().backward()
    results = run_ranks(_contrastive, sizes)
    assert torch.allclose(torch.cat([r[0] for r in results])[valid], loss.detach()[valid], atol=1e-6)
    assert torch.allclose(torch.cat([r[1] for r in results]), p.grad, atol=1e-6)
    assert torch.allclose(torch.cat([r[2] for r in results]), z.grad, atol=1e-6)


def _one_pair_each(rank, valid):
    policy, lara = build("output", alignment="contrastive")
    batch = make_batch(size=1, seed=rank)
    batch["lara_frames_valid"] = torch.tensor([valid[rank]])
    policy(batch)["loss"].backward()
    return lara.metrics()["compared_pairs"], "negatives" in lara._monitor._warned


def test_pairs_of_other_ranks_are_negatives():
    assert run_ranks(_one_pair_each, (True, True)) == [(2, False)] * 2
    assert run_ranks(_one_pair_each, (True, False)) == [(1, True)] * 2


def _cotrain(rank, alignment, lam, views):
    """Frames: on both ranks, on one, on none, on the other. With several views a rank gathers several times."""
    torch.manual_seed(0)
    policy = FixedDit().train()
    model = OwnLam() if lam == "own" else LatentActionModel(LatentActionConfig.tiny(**{**TINY, "vq_revive_every": 1}))
    lara = attach_lara(policy, model, align_weight=0.3, lam_weight=0.2, alignment=alignment, frames_optional=True)
    wrapped = DistributedDataParallel(policy)
    found = []
    for step, with_frames in enumerate(((0, 1), (0,), (), (1,), (0, 1))):
        batch = make_batch(seed=10 * step + rank, views=views if rank == 0 else None)
        if rank not in with_frames:
            del batch["lara_frames"]
        policy.zero_grad()
        wrapped(batch)["loss"].backward()
        assert all(p.grad is not None for p in policy.parameters())
        moved = any(p.grad.any() for p in lara.parameters())
        found.append((moved, bool(lara.metrics()), lara.step))
    return found, gradients(policy)


@pytest.mark.parametrize(
    ("alignment", "lam", "views"),
    [("cosine", "own", None), ("cosine", "tiny", None), ("contrastive", "own", 2), ("contrastive", "tiny", None)],
)
def test_ranks_with_and_without_frames_train_together(alignment, lam, views):
    (one, grad_one), (two, grad_two) = run_ranks(_cotrain, alignment, lam, views)
    assert [moved for moved, *_ in one] == [True, True, False, True, True]
    assert [measured for _, measured, _ in one] == [True, True, False, False, True]
    assert [measured for _, measured, _ in two] == [True, False, False, True, True]
    assert [step for *_, step in one] == [step for *_, step in two] == [1, 2, 3, 4, 5]
    assert all(torch.equal(grad_one[name], grad_two[name]) for name in grad_one)


def _outside(rank):
    """The failure this design avoids: the loss computed after the wrapped forward."""
    policy, lara = build("output", add_to_loss=False)
    model = DistributedDataParallel(policy, find_unused_parameters=True)
    for _ in range(2):
        (model(make_batch(seed=rank))["loss"] + lara.losses.total).backward()


def test_the_trap_is_real_a_loss_kept_aside_crashes_ddp():
    with pytest.raises(RankError, match=r"mark a variable ready only once|ready twice"):
        run_ranks(_outside)


# ------------------------------------------------------------------ FSDP2


def _fsdp(rank, layout, with_lara, alignment="cosine"):
    from torch.distributed.fsdp import fully_shard

    policy, lara = build("output", lam="tiny", alignment=alignment)
    if not with_lara:
        lara.detach()
    reference = copy.deepcopy(policy)
    for block in policy.transformer_blocks:
        fully_shard(block)
    if with_lara and layout == "units":
        for unit in lara.fsdp_units():
            fully_shard(unit)
    fully_shard(policy)
    batches = [make_batch(seed=r) for r in range(2)]
    policy(batches[rank])["loss"].backward()
    found = {n: p.grad.full_tensor() for n, p in policy.named_parameters() if p.grad is not None}
    if alignment == "contrastive":
        return found, None, None
    ratio = {}
    for r in range(2):  # the single-process mean
        with _alone():
            (reference(batches[r])["loss"] / 2).backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    state = None
    if with_lara:
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            policy(make_batch(seed=10 * rank + step))["loss"].backward()
            optimizer.step()
        state = lara.metrics()["total"]
    return {n: (found[n], expected[n]) for n in expected}, state, ratio


class _alone:
    """Within it nothing is gathered over ranks: the reference is one process."""

    def __enter__(self):
        self.initialised = dist.is_initialized
        dist.is_initialized = lambda: False

    def __exit__(self, *exc):
        dist.is_initialized = self.initialised


@pytest.mark.skipif(TORCH < (2, 11), reason="FSDP2 is supported from torch 2.11 on (gloo sums gradients on 2.7)")
@pytest.mark.parametrize("layout", ["root", "units"])
def test_fsdp2_gradients_equal_those_of_one_process_as_the_control_does(layout):
    control = run_ranks(_fsdp, layout, False)
    for found, _, _ in control:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in found.values())
    for found, total, _ in run_ranks(_fsdp, layout, True):
        assert any(name.startswith("lara.lam") for name in found)
        for name, (gradient, expected) in found.items():
            assert torch.allclose(gradient, expected, atol=1e-6), name
        assert total == total


def _fsdp_save(rank, folder):
    from torch.distributed.fsdp import fully_shard

    policy, lara = build("output", lam="tiny")
    whole = {k: v.clone() for k, v in lara.state_dict().items()}
    for unit in lara.fsdp_units():
        fully_shard(unit)
    fully_shard(policy)
    lara.save_pretrained(folder)
    dist.barrier()
    from helpers.models import FixedDit

    from lara_adapter import load_lara

    again = load_lara(FixedDit(), folder)
    return all(torch.equal(v, whole[k]) for k, v in again.state_dict().items())


@pytest.mark.skipif(TORCH < (2, 11), reason="FSDP2 is supported from torch 2.11 on")
def test_saving_under_fsdp2_is_a_collective_that_writes_whole_tensors_once(tmp_path):
    assert run_ranks(_fsdp_save, str(tmp_path / "adapter")) == [True, True]


def _ddp_save(rank, folder, all_ranks):
    policy, lara = build("output")
    DistributedDataParallel(policy)
    if all_ranks or rank == 0:
        lara.save_pretrained(folder)
    dist.barrier()
    return True


@pytest.mark.parametrize("all_ranks", [True, False])
def test_saving_under_ddp_works_from_all_ranks_or_from_the_first(tmp_path, all_ranks):
    run_ranks(_ddp_save, str(tmp_path / "adapter"), all_ranks)
    assert (tmp_path / "adapter" / "lara_config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
