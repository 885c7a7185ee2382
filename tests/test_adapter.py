"""What a user holds: metrics, groups, precision, copies, guards."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
import weakref

import pytest
import torch
from helpers.toys import DitPolicy, OwnLam, make_batch
from torch import nn

from lara_adapter import (
    AttachOrderError,
    LaraArgumentError,
    LatentActionConfig,
    LatentActionModel,
    NonFiniteError,
    attach_lara,
)
from lara_adapter.metrics import CollapseMonitor
from lara_adapter.schedules import Cutoff


@pytest.fixture
def lara(policy):
    return attach_lara(policy, LatentActionModel(LatentActionConfig.tiny()))


def test_metrics_are_plain_floats_with_known_keys(policy, lara, batch):
    assert lara.metrics() == {}
    policy(batch)
    metrics = lara.metrics()
    assert all(type(value) is float for value in metrics.values())
    assert metrics.keys() >= {
        "align_loss", "lam_loss", "total", "align_weight", "lam_weight", "cosine", "valid_fraction", "latent_std",
        "mean_direction", "reconstruction_loss", "copy_loss", "reconstruction_over_copy", "codebook_loss",
        "commitment_loss", "perplexity", "codes_used",
    }  # fmt: skip
    assert metrics["align_loss"] == pytest.approx(1 - metrics["cosine"], abs=1e-5)


def test_mean_direction_and_latent_std_by_hand(policy, batch):
    lara = attach_lara(policy, OwnLam())
    policy(batch)
    z = lara.lam.encode(batch["lara_frames"][:, 0], batch["lara_frames"][:, 1]).continuous.flatten(1)
    unit = z / z.norm(dim=1, keepdim=True)
    assert lara.metrics()["mean_direction"] == pytest.approx(unit.mean(0).square().sum().item(), rel=1e-4)
    assert lara.metrics()["latent_std"] == pytest.approx(z.std(0, unbiased=False).mean().item(), rel=1e-4)


def test_losses_before_the_first_training_forward(lara):
    with pytest.raises(LaraArgumentError, match="no training forward has run"):
        _ = lara.losses


def test_no_graph_outlives_the_next_forward(policy, lara, batch):
    policy(batch)["loss"].backward()
    hidden = weakref.ref(policy.hidden_states[-3])
    policy.hidden_states = []
    policy(batch)
    assert hidden() is None


def test_param_groups_hold_every_trainable_parameter_once(policy, lara):
    groups = lara.param_groups(lr=1e-3, lam_lr=1e-4, weight_decay=0.1)
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in lara.parameters() if p.requires_grad)
    by_name = {g["name"]: g for g in groups}
    assert by_name["lara_projector"]["lr"] == 1e-3
    assert by_name["lara_lam"]["lr"] == by_name["lara_lam_no_decay"]["lr"] == 1e-4
    assert by_name["lara_lam_no_decay"]["weight_decay"] == by_name["lara_projector_no_decay"]["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in by_name["lara_lam"]["params"])
    codebook = [p for n, p in lara.lam.named_parameters() if "quantizer" in n]
    assert codebook
    assert {id(p) for p in codebook} <= {id(p) for p in by_name["lara_lam_no_decay"]["params"]}
    torch.optim.AdamW(groups)
    frozen = attach_lara(DitPolicy(), OwnLam(), train_lam=False)
    assert [g["name"] for g in frozen.param_groups()] == ["lara_projector", "lara_projector_no_decay"]


def test_the_optimizer_of_the_policy_moves_projector_and_lam(policy, lara, batch):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    before = {n: p.clone() for n, p in lara.named_parameters()}
    for _ in range(3):  # the decoder's head starts at zero, so what feeds it moves from the second step on
        optimizer.zero_grad()
        policy(batch)["loss"].backward()
        optimizer.step()
    # the codebook waits for the end of the quantiser's warm-up
    still = {n for n, p in lara.named_parameters() if torch.equal(before[n], p)}
    assert all("quantizer" in name for name in still), still


def test_training_aligns(policy, batch):
    """The reason for all this: the cosine rises, the action loss too gets smaller."""
    lara = attach_lara(policy, OwnLam(), align_weight=1.0, lam_weight=1.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    cosines = []
    for _ in range(60):
        optimizer.zero_grad()
        policy(batch)["loss"].backward()
        optimizer.step()
        cosines.append(lara.metrics()["cosine"])
    assert cosines[-1] > 0.9 > cosines[0]


def test_projector_stays_float32_when_the_policy_is_cast(policy, lara, batch):
    policy.to(torch.bfloat16)
    assert policy.action_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in lara.parameters()} == {torch.float32}
    policy.float().half()
    assert {p.dtype for p in lara.parameters()} == {torch.float32}
    policy.double()
    assert lara.projector[0].weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_losses_in_float32(policy, lara, batch, dtype):
    torch.manual_seed(1)
    policy(batch)
    exact = lara.losses
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        policy(batch)["loss"].backward()
    assert lara.losses.align.dtype == lara.losses.total.dtype == torch.float32
    assert torch.allclose(lara.losses.align, exact.align, atol=0.05)
    assert lara.projector[0].weight.grad.dtype == torch.float32


def test_a_16_bit_policy_trains_with_a_float32_projector(batch):
    policy = DitPolicy().train().to(torch.bfloat16)
    lara = attach_lara(policy, OwnLam())
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
    policy.loss_of = lambda b: (policy.denoise(b["state"], b["action"], b["state"][:, 0]), torch.ones(1))
    policy(batch)["loss"].backward()
    assert lara.projector[0].weight.grad.dtype == torch.float32
    assert policy.action_in.weight.grad.dtype == torch.bfloat16


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True], ids=["lam trains", "lam frozen"])
def test_under_a_16_bit_default_dtype_all_of_lara_is_float32_and_moves(default, frozen, batch):
    """Hosts load a policy under its dtype as the default; in 16 bits most of LARA's weights would never move."""
    torch.manual_seed(0)
    with default_dtype(default):
        policy = DitPolicy().train().float()
        lara = attach_lara(
            policy, LatentActionModel(LatentActionConfig.tiny()), align_weight=Cutoff(0.5, 4), train_lam=not frozen
        )
        kept = {t.dtype for t in (*lara.parameters(), *lara.buffers()) if t.is_floating_point()}
        assert kept == {torch.float32}
        terms = {}
        lara.register_forward_hook(lambda module, args, output: terms.update(output))
        before = [p.detach().clone() for p in lara.projector.parameters()]
        policy(batch)["loss"].backward()
        torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0).step()
        moved = [(p != old).float().mean().item() for p, old in zip(lara.projector.parameters(), before)]
        assert min(moved) > 0.9
        assert {term.dtype for term in terms.values() if isinstance(term, torch.Tensor)} == {torch.float32}
        assert lara.metrics()["align_weight"] == 0.5


def test_a_16_bit_default_dtype_changes_no_number(batch):
    def run(dtype):
        torch.manual_seed(0)
        policy, lam = DitPolicy().train(), OwnLam()
        with default_dtype(dtype):
            torch.manual_seed(1)
            lara = attach_lara(policy, lam)
        policy(batch)
        return [*lara.projector.parameters(), lara.losses.total]

    assert all(torch.equal(a, b) for a, b in zip(run(torch.float32), run(torch.bfloat16)))


def test_a_meta_default_device_does_not_take_laras_values(policy, batch):
    with torch.device("meta"):
        lara = attach_lara(policy, OwnLam().to_empty(device="cpu"))
    assert not any(t.is_meta for t in (*lara.parameters(), *lara.buffers()))
    assert lara.step == 0


def test_a_lam_in_16_bits_trains_in_float32_and_says_so(policy, caplog):
    lam = LatentActionModel(LatentActionConfig.tiny()).to(torch.bfloat16)
    held = list(lam.parameters())
    lara = attach_lara(policy, lam, projector=nn.Linear(16, lam.latent_width, dtype=torch.float16))
    assert {t.dtype for t in (*lara.parameters(), *lara.buffers()) if t.is_floating_point()} == {torch.float32}
    assert all(a is b for a, b in zip(held, lam.parameters()))  # an optimizer may hold them already
    assert [r.message.split(",")[0] for r in caplog.records if "came in" in r.message] == [
        "attach_lara: projector= came in torch.float16 and trains",
        "attach_lara: lam= came in torch.bfloat16 and trains",
    ]


def test_what_is_frozen_of_a_lam_keeps_its_16_bits(policy, caplog):
    part, whole = OwnLam(), OwnLam().half()
    part.future.half().requires_grad_(False)
    attach_lara(policy, part)
    assert part.future.weight.dtype == torch.float16
    attach_lara(DitPolicy(), whole, train_lam=False)
    assert whole.inverse.weight.dtype == torch.float16
    assert "came in" not in caplog.text


def test_nearly_aligned_vectors_are_told_from_aligned_ones(policy, batch):
    """In bfloat16 1 - cos of such vectors is 0.0; the loss is computed in float32."""
    lam = OwnLam()
    lara = attach_lara(policy, lam, projector=nn.Identity())
    frames = batch["lara_frames"]
    z = lam.encode(frames[:, 0], frames[:, 1]).continuous[:, 0].detach()
    near = (z + 0.01 * z.norm(dim=1, keepdim=True) * torch.randn(4, 8))[None]
    valid = torch.ones(1, 4, dtype=torch.bool)
    lam.forward, forward = None, lam.forward
    lam.forward = torch.autocast("cpu", enabled=False)(forward)  # the latent itself exact: only the loss is judged
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = lara(near, frames[:, None, 0], frames[:, None, 1], valid, valid[0])
    assert 0 < terms["align"] < 2e-3


@pytest.mark.parametrize(
    ("where", "message"),
    [("hidden", "the policy's hidden state is not finite"), ("lam", "the LAM's"), ("projector", "alignment loss")],
)
def test_non_finite_terms_stop_before_the_weights_and_name_the_culprit(policy, lara, batch, where, message):
    with torch.no_grad():
        if where == "hidden":
            policy.state_in.weight[0, 0] = float("nan")
        elif where == "lam":
            next(p for n, p in lara.lam.named_parameters() if "forward_dynamics" in n).fill_(float("inf"))
        else:
            lara.projector[0].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=message):
        policy(batch)


def test_metrics_name_a_non_finite_term():
    lara = attach_lara(DitPolicy().train(), OwnLam())
    lara._values = {"align_loss": torch.tensor(float("nan")), "lam_loss": torch.tensor(0.0)}
    with pytest.raises(NonFiniteError, match="align_loss is nan"):
        lara.metrics()


# ------------------------------------------------------------------ copies


def test_a_copy_made_between_forward_and_backward_neither_fails_nor_shares(policy, lara, batch):
    loss = policy(batch)["loss"]
    policy.hidden_states = []  # the toy's own record for the tests
    double = copy.deepcopy(policy)
    assert double.lara is not lara
    assert double.lara.policy is double
    assert double.lara._losses is None
    values = double.lara.metrics()
    double(make_batch(seed=9))["loss"].backward()
    assert double.lara.metrics() != values
    assert lara.projector[0].weight.grad is None
    loss.backward()
    assert lara.projector[0].weight.grad is not None
    double.lara.detach()
    assert policy.lara is lara
    policy(batch)


def test_an_ema_copys_forward_does_not_write_into_the_student(policy, lara, batch):
    torch.manual_seed(1)
    policy(batch)["loss"].backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    policy.hidden_states = []
    teacher = copy.deepcopy(policy)
    torch.manual_seed(1)
    loss = policy(batch)["loss"]
    with torch.no_grad():
        teacher(make_batch(seed=3))
        teacher.get_action(batch["state"])
    loss.backward()
    for name, parameter in policy.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_out_of_a_pickle_training_is_refused_until_rebound(policy, lara, batch):
    torch.manual_seed(2)
    expected = policy(batch)["loss"].item()
    policy.hidden_states = []
    stream = io.BytesIO()
    torch.save(policy, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    assert again.state_dict().keys() == policy.state_dict().keys()
    with torch.no_grad():
        again(batch)  # acting needs no LARA
    with pytest.raises(AttachOrderError, match=r"was unpickled.*policy\.lara\.rebind\(\)"):
        again(batch)
    again.lara.rebind()
    again.lara.step = 0
    torch.manual_seed(2)
    assert again(batch)["loss"].item() == pytest.approx(expected, rel=1e-3)  # the quantiser's statistics moved on
    again.lara.detach()
    assert "forward" not in again.__dict__
    pickle.loads(pickle.dumps(lara.config))


def test_detached_copy_holds_nothing_of_lara_and_leaves_the_original_attached(policy, batch):
    plain = copy.deepcopy(policy)
    lara = attach_lara(policy, OwnLam())
    policy(batch)
    policy.hidden_states = []
    double = lara.detached_copy()
    assert double.state_dict().keys() == plain.state_dict().keys()
    assert double.__dict__.keys() == plain.__dict__.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in double.modules())
    for model in (double, plain):
        torch.manual_seed(1)
        model(batch)["loss"].backward()
    assert all(torch.equal(p.grad, dict(plain.named_parameters())[n].grad) for n, p in double.named_parameters())
    assert lara.check(batch).ok
    assert policy.lara is lara


# ------------------------------------------------------------------ checkpoints of the policy


def test_a_checkpoint_without_lara_loads_strictly_and_one_with_it_restores(policy, batch, caplog):
    plain = {k: v.clone() + 1 for k, v in policy.state_dict().items()}
    lara = attach_lara(policy, OwnLam())
    before = {k: v.clone() for k, v in lara.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        policy.load_state_dict(plain, strict=True)
    assert "has no LARA weights" in caplog.text
    assert all(torch.equal(before[k], v) for k, v in lara.state_dict().items())
    assert all(torch.equal(policy.state_dict()[k], v) for k, v in plain.items())
    policy(batch)
    full = {k: v.clone() for k, v in policy.state_dict().items()}
    other = DitPolicy().train()
    attach_lara(other, OwnLam())
    other.load_state_dict(full, strict=True)
    assert other.lara.step == 1
    assert all(torch.equal(other.state_dict()[k], v) for k, v in full.items())


def test_a_damaged_lara_part_is_still_an_error(policy, lam):
    attach_lara(policy, lam)
    state = policy.state_dict()
    del state["lara.projector.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*lara\.projector\.0\.weight"):
        policy.load_state_dict(state)


def test_safetensors_save_of_an_attached_policy(policy, lara, tmp_path):
    from safetensors.torch import save_file

    save_file(policy.state_dict(), tmp_path / "model.safetensors")


# ------------------------------------------------------------------ collapse


def observe(monitor, *looks):
    for perplexity, direction in looks:
        monitor.observe({"perplexity": torch.tensor(float(perplexity)), "mean_direction": direction}, True)


def test_the_collapse_monitor_warns_once_about_each_symptom(caplog):
    monitor = CollapseMonitor(every=2)
    with caplog.at_level(logging.WARNING):
        observe(monitor, (60, 0.2), (60, 0.2), (58, 0.9), (50, 0.9), (25, 0.95), (20, 0.96))
    text = [r.getMessage() for r in caplog.records]
    assert len(text) == 2
    assert "mean direction of the latent action rose from 0.20 to 0.90" in text[0]
    assert "perplexity of the codes fell from 60.0 to 20.0" in text[1]
    assert "alignment='contrastive'" in text[0]


def test_a_lam_that_began_with_a_large_constant_part_is_not_suspected(caplog):
    with caplog.at_level(logging.WARNING):
        observe(CollapseMonitor(every=2), (100, 0.93), (100, 0.93), (90, 0.94), (90, 0.94), (80, 0.5), (80, 0.5))
    assert not caplog.records


def test_the_contrastive_alignment_is_not_advised_to_who_uses_it(caplog):
    with caplog.at_level(logging.WARNING):
        observe(CollapseMonitor(every=1, contrastive=True), (100, 0.2), (100, 0.99))
    assert "lam_grad_scale" in caplog.text
    assert "alignment='contrastive'" not in caplog.text


def no_negatives(caplog):
    return [r.message for r in caplog.records if "no negatives" in r.message]


@pytest.mark.parametrize("views", [None, 2], ids=["one view", "two views"])
def test_a_contrastive_alignment_without_negatives_warns_once(policy, lam, views, caplog):
    """A batch of one with gradient accumulation: the loss is always 0. Views are not negatives."""
    lara = attach_lara(policy, lam, alignment="contrastive")
    for seed in range(3):
        policy(make_batch(size=1, seed=seed, views=views))["loss"].backward()
    assert lara.losses.align == 0
    assert lara.metrics()["compared_pairs"] == 1
    (message,) = no_negatives(caplog)
    assert "valid pairs of all ranks 1, in a batch of 1 on this rank, at least 2" in message
    assert "Gradient accumulation does not add negatives" in message


def test_other_noise_draws_of_a_sample_are_not_its_negatives(policy, lam, caplog):
    lara = attach_lara(policy, lam, alignment="contrastive")
    frames = torch.rand(1, 1, 3, 8, 8)
    flags = torch.ones(3, 1, dtype=torch.bool)
    terms = lara(torch.randn(3, 1, 16), frames, frames, flags, flags[0])
    assert terms["compared_pairs"] == 1
    flags = torch.tensor([[True, False], [True, True]])  # the second draw is compared
    frames = frames.expand(2, -1, -1, -1, -1)
    assert lara(torch.randn(2, 2, 16), frames, frames, flags, flags[1])["compared_pairs"] == 2


def test_one_valid_pair_in_a_larger_batch_has_no_negatives_either(policy, lam, batch, caplog):
    attach_lara(policy, lam, alignment="contrastive")
    batch["lara_frames_valid"] = torch.tensor([True, False, False, True])
    policy(batch)
    assert not no_negatives(caplog)
    batch["lara_frames_valid"] = torch.tensor([True, False, False, False])
    policy(batch)
    assert "all ranks 1, in a batch of 4" in no_negatives(caplog)[0]


def test_alignments_without_negatives_need_none(policy, lam, caplog):
    lara = attach_lara(policy, lam)
    policy(make_batch(size=1))
    assert "compared_pairs" not in lara.metrics()
    assert not no_negatives(caplog)


def test_a_frozen_lam_is_not_suspected(caplog):
    monitor = CollapseMonitor(every=1)
    with caplog.at_level(logging.WARNING):
        for direction in (0.1, 1.0):
            monitor.observe({"mean_direction": direction}, False)
    assert not caplog.records


def test_cosine_alignment_without_a_lam_loss_collapses_and_warns(policy, batch, caplog):
    """The trivial solution of METHOD: both sides trainable, nothing holds the latent."""
    lara = attach_lara(policy, OwnLam(), align_weight=1.0, lam_weight=0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    with caplog.at_level(logging.WARNING):
        for seed in range(150):
            optimizer.zero_grad()
            policy(make_batch(seed=seed, size=16))["loss"].backward()
            optimizer.step()
    assert lara.metrics()["mean_direction"] > 0.8
    assert "mean direction of the latent action" in caplog.text


def test_repr_says_what_is_attached(policy, lara):
    assert "layer=3/5, tap='transformer_blocks.2', token='last_valid'" in repr(policy)
