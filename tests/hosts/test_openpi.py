"""LARA on openpi's real PI0Pytorch, built tiny: pi0 and pi0.5, openpi's forced checkpointing, its strict files, DDP."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("openpi", reason="openpi is not installed: make test-openpi")

import safetensors.torch
from helpers import openpi_disk  # noqa: F401  # before openpi is imported
from helpers.toys import SIZE, OwnLam
from lara_adapter.integrations.openpi import (
    OpenpiLaraSettings,
    attach,
    load_policy,
    observation_frames,
    save_policy,
)

from examples import openpi_tiny
from examples.openpi_tiny import HORIZON, make_batch
from lara_adapter import (
    FrameError,
    LaraArgumentError,
    LatentActionConfig,
    LatentActionModel,
    attach_lara,
    load_lara,
    policies,
)
from lara_adapter.policies import find_spec

NAMES = ["pi0", "pi05"]
both = pytest.mark.parametrize("name", NAMES)
DEPTH = 4


@functools.lru_cache(maxsize=2)
def _prototype(name: str) -> nn.Module:
    return openpi_tiny.build(name == "pi05")


def policy_of(name: str) -> nn.Module:
    return copy.deepcopy(_prototype(name))


def step(policy: nn.Module, batch: tuple, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return policy(*batch)


def batch_of(seed: int = 0, frames: int | None = SIZE) -> tuple:
    return make_batch(2, seed, frames)


def layers(policy: nn.Module) -> nn.ModuleList:
    return policy.paligemma_with_expert.gemma_expert.model.layers


class ResidualStream:
    """The state after each expert layer of one training forward, with its graph: openpi's last residual sum, done again
    from what goes into the second norm and what the MLP gives. Not where LARA reads it."""

    def __init__(self, policy: nn.Module) -> None:
        self.parts: dict[tuple[int, str], torch.Tensor | None] = {}
        self.handles = []
        for index, layer in enumerate(layers(policy), 1):
            self.handles.append(layer.post_attention_layernorm.register_forward_hook(self._norm(index)))
            self.handles.append(layer.mlp.register_forward_hook(self._mlp(index)))

    def _norm(self, index):
        def hook(module, args, output):
            self.parts.setdefault((index, "middle"), args[0])
            self.parts.setdefault((index, "gate"), output[1])

        return hook

    def _mlp(self, index):
        def hook(module, args, output):
            self.parts.setdefault((index, "mlp"), output)

        return hook

    def after(self, index: int) -> torch.Tensor:
        middle, mlp, gate = (self.parts[index, name] for name in ("middle", "mlp", "gate"))
        return middle + mlp if gate is None else middle + mlp * gate

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def checkpointing(policy: nn.Module, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "none": openpi's forced checkpointing is taken out; "forced": as it is; "nested": as its training script has it."""
    if mode == "none":
        monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda function, *args, **kwargs: function(*args))
    elif mode == "nested":
        policy.gradient_checkpointing_enable()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- the tap


@both
@pytest.mark.parametrize("mode", ["none", "forced", "nested"])
def test_the_tap_of_every_layer_is_the_state_that_leaves_it(name, mode, monkeypatch):
    policy = policy_of(name)
    checkpointing(policy, mode, monkeypatch)
    found = []
    for layer in range(1, DEPTH + 1):
        seen = []

        def token(hidden, batch, seen=seen):
            seen.append(hidden.detach())
            return hidden[:, -1]

        lara = attach_lara(policy, OwnLam(), layer, token=token, frames=observation_frames)
        stream = ResidualStream(policy)
        with torch.no_grad():
            policy.eval()
            step(policy, batch_of())  # not a training forward: nothing is tapped
            policy.train()
        assert not seen
        stream.parts.clear()
        step(policy, batch_of())
        stream.remove()
        lara.detach()
        assert torch.equal(seen[0], stream.after(layer))
        assert seen[0].shape == (2, HORIZON + (name == "pi0"), 64)  # pi0: the state token comes first
        found.append(seen[0])
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@both
def test_after_norm_is_what_the_last_projection_reads(name):
    policy = policy_of(name)
    seen, read = [], []

    policy.action_out_proj.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    lara = attach(policy, OwnLam(), OpenpiLaraSettings(after_norm=True))
    lara.projector.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    step(policy, batch_of())
    assert lara.config.tap == "action_out_proj"
    assert torch.equal(seen[0].reshape(2, 64), read[0][:, -1])
    other = attach(policy_of(name), OwnLam(), OpenpiLaraSettings())
    assert other.config.tap == "paligemma_with_expert.gemma_expert.model.norm"
    with pytest.raises(LaraArgumentError, match="after_norm=True is for the last layer"):
        attach(policy_of(name), OwnLam(), OpenpiLaraSettings(layer=-3, after_norm=True))


@both
def test_after_norm_is_of_one_call_and_leaves_the_policy_table_alone(name, tmp_path, caplog):
    table = list(policies._TABLE)
    lara = attach(policy_of(name), LatentActionModel(LatentActionConfig.tiny()), OpenpiLaraSettings(after_norm=True))
    attach(policy_of(name), OwnLam())
    assert table == policies._TABLE
    lara.save_pretrained(tmp_path)
    again = load_lara(policy_of(name), tmp_path, frames=observation_frames)
    assert again.config.tap == "action_out_proj"
    assert "was saved with the state at" not in caplog.text
    assert table == policies._TABLE


@both
def test_sampling_is_bit_identical_and_quiet(name):
    plain, policy = policy_of(name).eval(), policy_of(name)
    lara = attach(policy, OwnLam())
    step(policy, batch_of()).mean().backward()
    policy.eval()
    observation, noise = batch_of()[0], torch.randn(2, HORIZON, 32)
    # the class's: the instance's is torch.compile(mode="max-autotune") of it, which takes minutes
    sample = type(plain).sample_actions
    acted = sample(policy, "cpu", observation, noise, num_steps=2)
    assert torch.equal(acted, sample(plain, "cpu", batch_of(frames=None)[0], noise, num_steps=2))
    assert lara.step == 1
    assert lara.binding._captured == ()


# ---------------------------------------------------------------------- losses and gradients


@both
def test_the_loss_keeps_its_shape_and_the_mean_is_right(name):
    plain, policy = policy_of(name), policy_of(name)
    own = step(plain, batch_of(frames=None))
    lara = attach(policy, OwnLam(), OpenpiLaraSettings(align_weight=0.3, lam_weight=0.2))
    out = step(policy, batch_of())
    assert out.shape == own.shape == (2, HORIZON, 32)
    terms = lara.losses
    assert float(terms.total) == pytest.approx(0.3 * float(terms.align) + 0.2 * float(terms.lam), rel=1e-6)
    assert float(out.mean()) == pytest.approx(float(own.mean() + terms.total), rel=1e-6)
    torch.testing.assert_close(out, own + terms.total)


@both
@pytest.mark.parametrize("layer", [2, -1])
def test_gradients_are_those_of_the_sum_done_by_hand(name, layer, monkeypatch):
    """By hand: no checkpointing, the state from the residual sum, the terms written out."""
    found = {}
    for mode in ("none", "forced", "nested"):
        with monkeypatch.context() as patch:
            policy = policy_of(name)
            checkpointing(policy, mode, patch)
            torch.manual_seed(5)
            lara = attach(policy, OwnLam(), OpenpiLaraSettings(layer=layer, align_weight=0.5, lam_weight=0.2))
            step(policy, batch_of()).mean().backward()
            found[mode] = gradients(policy)
    for mode in ("forced", "nested"):
        assert found[mode].keys() == found["none"].keys()
        assert all(torch.equal(found[mode][key], found["none"][key]) for key in found["none"]), mode

    projector, lam = copy.deepcopy(lara.projector), copy.deepcopy(lara.lam)
    projector.zero_grad()
    lam.zero_grad()
    policy = policy_of(name)
    checkpointing(policy, "none", monkeypatch)
    stream = ResidualStream(policy)
    observation, actions = batch_of()
    loss = step(policy, (observation, actions)).mean()
    present, future = observation.lara_frames.unbind(1)
    output = lam(present, future)
    target = output.latent.continuous.flatten(1)
    state = stream.after(lara.config.layer)[:, -1]
    align = (1 - F.cosine_similarity(projector(state), target, dim=-1)).mean()
    (loss + 0.5 * align + 0.2 * output.loss).backward()
    by_hand = gradients(policy)
    by_hand |= {f"lara.projector.{key}": grad for key, grad in gradients(projector).items()}
    by_hand |= {f"lara.lam.{key}": grad for key, grad in gradients(lam).items()}
    assert by_hand.keys() == found["none"].keys()
    for key, grad in by_hand.items():
        torch.testing.assert_close(found["none"][key], grad, rtol=1e-4, atol=1e-7, msg=key)


@both
def test_the_alignment_reaches_the_layers_below_the_tap_alone(name):
    policy = policy_of(name)
    lara = attach(policy, OwnLam(), OpenpiLaraSettings(layer=2))
    step(policy, batch_of())
    lara.losses.align.backward()
    reached = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers(policy)]
    assert reached == [True, True, False, False]
    assert policy.action_out_proj.weight.grad is None
    assert policy.paligemma_with_expert.paligemma.model.language_model.layers[0].mlp.up_proj.weight.grad.any()


@both
def test_the_optimizer_of_openpis_script_moves_all_of_lara(name):
    policy = policy_of(name)
    lara = attach(policy, OwnLam(), OpenpiLaraSettings(layer=-2))
    batch = batch_of()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    step(policy, batch).mean().backward()
    before = {key: p.detach().clone() for key, p in lara.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(p, before[key]) for key, p in lara.named_parameters())


@both
def test_weights_of_zero_train_bit_identically(name):
    trained = []
    for with_lara in (False, True):
        policy, lam = policy_of(name), OwnLam()
        torch.manual_seed(9)
        if with_lara:
            attach(policy, lam, OpenpiLaraSettings(align_weight=0, lam_weight=0))
        optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), lr=1e-3)
        for index in range(2):
            policy(*batch_of(index, SIZE if with_lara else None)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append({key: p for key, p in policy.state_dict().items() if not key.startswith("lara.")})
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])


@both
def test_lara_leaves_the_noise_of_the_policy_alone(name):
    own = step(policy_of(name), batch_of(frames=None))
    policy = policy_of(name)
    attach_lara(policy, OwnLam(dropout=0.3), -1, frames=observation_frames, add_to_loss=False)
    assert torch.equal(step(policy, batch_of()), own)


@both
def test_pairs_past_the_end_of_the_episode_count_for_nothing(name):
    def losses_of(second: int) -> tuple[float, float]:
        policy = policy_of(name)
        torch.manual_seed(3)
        lara = attach(policy, OwnLam())
        observation, actions = batch_of()
        frames = observation.lara_frames.clone()
        frames[1, 1] = second
        observation = observation.replace(lara_frames=frames, lara_frames_valid=torch.tensor([True, False]))
        step(policy, (observation, actions))
        assert lara.metrics()["valid_fraction"] == 0.5
        return float(lara.losses.align), float(lara.losses.lam)

    assert losses_of(0) == losses_of(255)


@both
def test_bfloat16_as_openpi_trains(name):
    policy = openpi_tiny.build(name == "pi05", dtype="bfloat16")
    lara = attach(policy, OwnLam(), OpenpiLaraSettings(align_weight=1.0))
    step(policy, batch_of()).mean().backward()
    assert lara.projector[0].weight.grad.dtype == torch.float32
    assert lara.projector[0].weight.grad.any()
    assert layers(policy)[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert lara.losses.align.dtype == torch.float32


def test_the_librarys_own_lam():
    policy = policy_of("pi05")
    lara = attach(policy, LatentActionModel(LatentActionConfig.tiny()), OpenpiLaraSettings(alignment="contrastive"))
    step(policy, batch_of(frames=64)).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lara.parameters() if p.requires_grad)
    assert lara.config.alignment["name"] == "contrastive"


def test_a_stock_observation_is_refused_with_the_fix():
    policy = policy_of("pi05")
    attach(policy, OwnLam())
    with pytest.raises(FrameError, match=r"Observation carries no lara_frames; make the data loader"):
        step(policy, batch_of(frames=None))


# ---------------------------------------------------------------------- files


@both
def test_files_load_strictly_both_ways(name, tmp_path):
    plain, policy = openpi_tiny.build(name == "pi05", seed=7), policy_of(name)
    lara = attach(policy, OwnLam())
    before = {key: p.clone() for key, p in lara.state_dict().items()}
    safetensors.torch.save_model(plain, str(tmp_path / "plain.safetensors"))
    # openpi's own call, on the attached policy; and ours
    for load in (safetensors.torch.load_model, lambda model, file: load_policy(lara, file)):
        missing, unexpected = load(policy, tmp_path / "plain.safetensors")
        assert not missing
        assert not unexpected
        assert torch.equal(policy.action_in_proj.weight, plain.action_in_proj.weight)
        assert all(torch.equal(value, before[key]) for key, value in lara.state_dict().items())
    keys = list(policy.state_dict())
    save_policy(lara, tmp_path / "posttrained.safetensors")
    assert list(policy.state_dict()) == keys  # in their order: optimizers store by position
    stock = policy_of(name)
    missing, unexpected = safetensors.torch.load_model(stock, tmp_path / "posttrained.safetensors", strict=True)
    assert not missing
    assert not unexpected
    assert all(torch.equal(value, policy.state_dict()[key]) for key, value in stock.state_dict().items())
    # a file with LARA inside, written by somebody's own loop
    safetensors.torch.save_model(policy, str(tmp_path / "everything.safetensors"))
    with torch.no_grad():
        lara.projector[0].weight.zero_()
    load_policy(lara, tmp_path / "everything.safetensors")
    assert torch.equal(lara.projector[0].weight, before["projector.0.weight"])


def test_a_saved_adapter_is_attached_again(tmp_path):
    policy = policy_of("pi05")
    lara = attach(policy, LatentActionModel(LatentActionConfig.tiny()), OpenpiLaraSettings(after_norm=True))
    step(policy, batch_of(frames=64))
    lara.save_pretrained(tmp_path / "lara")
    again = load_lara(policy_of("pi05"), tmp_path / "lara", frames=observation_frames)
    assert again.config.tap == "action_out_proj"
    assert again.step == 1
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in lara.state_dict().items())


def test_openpi_checks_its_patched_transformers_before_lara_is_attached(monkeypatch):
    from transformers.models.siglip import check

    assert check.check_whether_transformers_replace_is_installed_correctly()
    monkeypatch.setattr(check, "check_whether_transformers_replace_is_installed_correctly", lambda: False)
    with pytest.raises(ValueError, match="transformers_replace is not installed correctly"):
        openpi_tiny.build()


def test_detaching_leaves_nothing():
    policy, plain = policy_of("pi05"), policy_of("pi05")
    lara = attach(policy, OwnLam())
    assert find_spec(policy).name == "openpi"
    step(policy, batch_of()).mean().backward()
    lara.detach()
    assert policy.state_dict().keys() == plain.state_dict().keys()
    assert type(policy) is type(plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in policy.modules())
    assert torch.equal(step(policy, batch_of(frames=None)), step(plain, batch_of(frames=None)))


# ---------------------------------------------------------------------- two ranks


def _attached(name: str) -> nn.Module:
    policy = policy_of(name)
    policy.gradient_checkpointing_enable()  # as openpi's script
    torch.manual_seed(0)
    attach(policy, OwnLam(), OpenpiLaraSettings(align_weight=1.0, lam_weight=1.0))
    return policy


def _share(rank: int) -> tuple:
    observation, actions = batch_of(rank)
    return observation.replace(lara_frames_valid=torch.tensor([rank == 0, rank == 0])), actions


def _on_a_rank(rank: int, name: str, static_graph: bool) -> dict[str, torch.Tensor]:
    policy = _attached(name)
    model = nn.parallel.DistributedDataParallel(
        policy, find_unused_parameters=True, gradient_as_bucket_view=True, static_graph=static_graph
    )
    for _ in range(2):
        model.zero_grad()
        step(model, _share(rank), rank).mean().backward()
    return gradients(policy)


@pytest.mark.parametrize(("name", "static_graph"), [("pi05", False), ("pi05", True), ("pi0", True)])
def test_ddp_gradients_are_the_mean_over_ranks(name, static_graph):
    """As openpi wraps it: unused parameters are looked for, and from 8 ranks on the graph is static. The pairs of one rank
    are all invalid."""
    from helpers.ranks import run_ranks

    alone = []
    for rank in range(2):
        policy = _attached(name)
        step(policy, _share(rank), rank).mean().backward()
        alone.append(gradients(policy))
    first, second = run_ranks(_on_a_rank, name, static_graph)
    assert first.keys() == alone[0].keys() | alone[1].keys()
    for key, value in first.items():
        assert torch.equal(value, second[key])
        parts = [grads.get(key, torch.zeros_like(value)) for grads in alone]
        torch.testing.assert_close(value, sum(parts) / 2, rtol=1e-5, atol=1e-8, msg=key)
