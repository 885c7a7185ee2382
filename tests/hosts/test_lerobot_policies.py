"""LARA on LeRobot's real policies, built tiny: the row of the policy table of each is proved, not believed."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")

from helpers import lerobot_tiny
from helpers.lerobot_tiny import FRAMES, HORIZON, POLICIES, make_batch, make_policy
from helpers.toys import SIZE, OwnLam

from lara_adapter import FrameError, LaraAdapter, LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.policies import find_spec

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # VLA-JEPA asks for autocast to float32

NAMES = list(POLICIES)
BYPASSING = ["pi0", "pi05", "smolvla"]  # the expert's layers are never called in training
every_policy = pytest.mark.parametrize("name", NAMES)


def own_optimizer(policy: nn.Module) -> torch.optim.Optimizer:
    """As lerobot-train makes it."""
    return policy.config.get_optimizer_preset().build(policy.get_optim_params())


def step(policy: nn.Module, batch: dict, seed: int = 1, **arguments) -> tuple:
    """forward() and not __call__: so does lerobot-train."""
    torch.manual_seed(seed)
    return policy.forward(dict(batch), **arguments)


def pad(batch: dict, lengths: list[int]) -> dict:
    """The batch with only the first lengths[i] action steps of sample i real."""
    steps = torch.arange(HORIZON)[None] < torch.tensor(lengths)[:, None]
    if "action_mask" in batch:
        return {**batch, "action_mask": batch["action_mask"] * steps[..., None]}
    return {**batch, "action_is_pad": ~steps}


def without_action(name: str, batch: dict) -> dict:
    batch = {key: value for key, value in batch.items() if "action" not in key and "lara" not in key}
    if name == "multi_task_dit":  # its queues add the time axis themselves
        batch = {key: value[:, 0] if key.startswith(("observation.images", "observation.state")) else value
                 for key, value in batch.items()}  # fmt: skip
    return batch


class Probe(nn.Linear):
    """A projector that keeps what it was given and what it gave."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = x
        self.gave = super().forward(x)
        return self.gave


def attach_probe(policy: nn.Module, lam: nn.Module, **arguments) -> LaraAdapter:
    width = attach_lara(copy.deepcopy(policy), OwnLam()).projector[0].in_features
    return attach_lara(policy, lam, projector=Probe(width, lam.latent_width), **arguments)


@contextlib.contextmanager
def residual_states(name: str, policy: nn.Module, lara: LaraAdapter) -> Iterator[dict[int, torch.Tensor]]:
    """The state after each block of the next training forward, got without LARA and not where LARA reads it.

    GR00T's own list of hidden states; of the other hosts that call their blocks, the input of whatever comes next; of
    those that walk the parts of their layers, the last residual sum, done again by hand.
    """
    states: dict[int, torch.Tensor] = {}
    parts: dict[tuple[int, str], torch.Tensor | None] = {}
    handles = []

    def keep(index: int):
        def hook(module, args):  # a value returned from a hook would replace the input
            states[index] = args[0].detach().clone()

        return hook

    def keep_part(index: int, what: str):
        def hook(module, args, output):
            if what == "mlp":
                parts.setdefault((index, "mlp"), output.detach().clone())
                return
            parts.setdefault((index, "middle"), args[0].detach().clone())
            gate = output[1] if isinstance(output, tuple) else None
            parts.setdefault((index, "gate"), gate if gate is None else gate.detach().clone())

        return hook

    blocks = policy.get_submodule(lara.config.blocks)
    if name == "groot":
        head = policy._groot_model.action_head.model
        handles.append(head.register_forward_hook(lambda m, args, output: states.update(enumerate(output[1]))))
    elif name in BYPASSING:
        for index, block in enumerate(blocks, 1):
            handles.append(block.post_attention_layernorm.register_forward_hook(keep_part(index, "middle")))
            handles.append(block.mlp.register_forward_hook(keep_part(index, "mlp")))
    else:
        after = {"multi_task_dit": "noise_predictor.output_proj", "xvla": "model.transformer.norm",
                 "vla_jepa": "model.action_model.model.norm_out"}[name]  # fmt: skip
        for index, module in enumerate([*blocks, policy.get_submodule(after)]):
            handles.append(module.register_forward_pre_hook(keep(index)))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
        for index in {index for index, _ in parts}:
            middle, mlp, gate = (parts[index, what] for what in ("middle", "mlp", "gate"))
            states[index] = middle + mlp if gate is None else middle + mlp * gate


# ---------------------------------------------------------------------- the tap


def tapped_and_true(name: str, policy: nn.Module, batch: dict, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    seen = []

    def token(hidden: torch.Tensor, batch: dict) -> torch.Tensor:
        seen.append(hidden.detach())
        return hidden[:, -1]

    lara = attach_lara(policy, OwnLam(), layer, token=token)
    with residual_states(name, policy, lara) as states:
        step(policy, batch)
    lara.detach()
    tapped, true = seen[0], states[lara.config.layer]
    if name == "xvla" and lara.config.layer == lara.config.depth:  # its last norm reads the action tokens alone
        tapped = tapped[:, :HORIZON]
    return tapped, true


@every_policy
def test_the_tap_is_the_state_that_leaves_the_block(name):
    policy, batch = make_policy(name), make_batch(name)
    depth = len(policy.get_submodule(find_spec(policy).blocks))
    states = {}
    for layer in (1, 2, -3, -2, -1):
        tapped, true = tapped_and_true(name, policy, batch, layer)
        assert len(tapped) == 2 * POLICIES[name].draws
        assert tapped.shape[1] >= POLICIES[name].offset + HORIZON or layer == -1
        assert torch.equal(tapped, true), f"layer {layer}"
        states[layer if layer > 0 else depth + 1 + layer] = true[:, :HORIZON]
    assert len(states) == depth
    assert not any(torch.equal(states[a], states[b]) for a in states for b in states if a < b)


VARIANTS = {
    "fewer expert than VLM layers": ("smolvla", {"num_expert_layers": 2, "self_attn_every_n_layers": -1}),
    "two observations": ("multi_task_dit", {"n_obs_steps": 2}),
    "diffusion": ("multi_task_dit", {"objective": "diffusion"}),
    "rotary": ("multi_task_dit", {"use_rope": True}),
    "projections per domain": ("xvla", {"use_hetero_proj": True}),
    "no world model": ("vla_jepa", {"enable_world_model": False}),
    "expert only": ("pi05", {"train_expert_only": True, "freeze_vision_encoder": True}),
    "float32": ("groot", {"use_bf16": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_settings_of_the_policies(variant):
    name, settings = VARIANTS[variant]
    policy, batch = make_policy(name, **settings), make_batch(name, 3)
    if "n_obs_steps" in settings:
        for key in (lerobot_tiny.CAMERA, lerobot_tiny.STATE):
            batch[key] = batch[key].expand(-1, 2, *batch[key].shape[2:])
    for layer in (1, -2, -1):
        assert torch.equal(*tapped_and_true(name, policy, batch, layer))
    lara = attach_lara(policy, OwnLam(), -1)
    report = lara.check(pad(batch, [2, HORIZON, 0]), own_optimizer(policy))
    assert report.ok, report
    assert report.valid_fraction == pytest.approx(2 / 3)


@every_policy
def test_the_tap_is_quiet_outside_of_training(name):
    policy, batch = make_policy(name), make_batch(name)
    lara = attach_lara(policy, OwnLam())
    loss, _ = step(policy, batch)
    policy.select_action(without_action(name, batch))
    policy.train()
    with torch.no_grad():
        step(policy, batch)
    assert lara.binding._captured == ()
    assert lara.step == 1
    loss.backward()  # what the forward left is untouched by the sampling
    assert lara.projector[0].weight.grad.any()


# ---------------------------------------------------------------------- gradients


@every_policy
@pytest.mark.parametrize("layer", [1, -3, -2, -1])
def test_check_passes_with_the_policys_own_optimizer(name, layer):
    policy = make_policy(name)
    lara = attach_lara(policy, OwnLam(), layer)
    report = lara.check(make_batch(name, 3), own_optimizer(policy))
    assert report.ok, report
    assert report.blocks_reached == report.blocks_below == lara.config.layer
    assert report.blocks_above_reached == 0
    assert report.optimizer_covers
    assert report.lam_reached


@every_policy
def test_the_terms_reach_what_is_below_the_tap_and_nothing_above(name):
    policy = make_policy(name)
    lara = attach_lara(policy, OwnLam(), -2, align_weight=1.0)
    step(policy, make_batch(name))
    lara.losses.align.backward()
    blocks = policy.get_submodule(lara.config.blocks)
    assert not any(p.grad is not None and p.grad.any() for p in blocks[-1].parameters())
    assert not any(p.grad is not None and p.grad.any() for p in policy.get_submodule(POLICIES[name].head).parameters())
    for block in blocks[:-1]:  # not only a bias somewhere: matrices of attention and of the MLP
        reached = {n for n, p in block.named_parameters() if p.ndim == 2 and p.grad is not None and p.grad.any()}
        assert any("att" in n for n in reached)
        assert any("mlp" in n or "ff" in n for n in reached)


@every_policy
def test_two_steps_move_projector_and_lam(name):
    policy = make_policy(name)
    lara = attach_lara(policy, OwnLam(), align_weight=0.5, lam_weight=0.5)
    before = {n: p.detach().clone() for n, p in lara.named_parameters()}
    optimizer = own_optimizer(policy)
    for seed in range(2):
        loss, _ = step(policy, make_batch(name, seed=seed), seed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[n]) for n, p in lara.named_parameters())
    assert all(p.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    def gradients(**settings) -> dict[str, torch.Tensor]:
        policy = make_policy(name, **settings)
        torch.manual_seed(0)
        lara = attach_lara(policy, OwnLam(), -2, align_weight=1.0)
        loss, _ = step(policy, make_batch(name))
        loss.backward()
        assert lara.step == 1
        return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    stored, recomputed = gradients(gradient_checkpointing=False), gradients(gradient_checkpointing=True)
    assert stored.keys() == recomputed.keys()
    assert all(torch.equal(stored[n], recomputed[n]) for n in stored)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pi05", "smolvla"])
def test_compile_model_gives_the_same_gradients(name, monkeypatch):
    """LeRobot's own switch compiles the model's forward and its sampling, before LARA is attached."""
    compile_of_torch = torch.compile
    # Inductor needs a compiler and minutes; what is traced is the same
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: compile_of_torch(function, backend="aot_eager"))
    steps = "num_steps" if name == "smolvla" else "num_inference_steps"  # of sampling; they are unrolled
    batch, found = make_batch(name), []
    noise, time = torch.randn(2, HORIZON, 5), torch.rand(2)
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        policy = make_policy(name, compile_model=compiled, **{steps: 1})
        for draw, fixed in (("sample_noise", noise), ("sample_time", time)):  # drawn inside the graph, else
            monkeypatch.setattr(policy.model, draw, lambda *args, fixed=fixed: fixed)
        torch.manual_seed(0)
        lara = attach_lara(policy, OwnLam(), -2, align_weight=1.0)
        for _ in range(2):
            policy.zero_grad()
            step(policy, batch)[0].backward()
        assert lara.step == 2
        found.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
        policy.select_action(without_action(name, batch))
        assert lara.binding._captured == ()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
    assert found[0].keys() == found[1].keys()
    for parameter_name, gradient in found[0].items():
        torch.testing.assert_close(found[1][parameter_name], gradient, msg=parameter_name)


@pytest.mark.parametrize("name", ["groot", "pi05", "vla_jepa"])
def test_with_the_librarys_own_lam(name):
    policy, batch = make_policy(name), make_batch(name)
    batch[FRAMES] = torch.rand(2, 2, 3, 64, 64)
    lara = attach_lara(policy, LatentActionModel(LatentActionConfig.tiny()), align_weight=0.1, lam_weight=0.1)
    assert lara.check(batch, own_optimizer(policy)).ok
    loss, metrics = step(policy, batch)
    loss.backward()
    assert metrics["lara/perplexity"] >= 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lara.parameters() if p.requires_grad)


def _on_a_rank(rank: int, name: str) -> dict[str, torch.Tensor]:
    policy = make_policy(name)
    torch.manual_seed(0)
    attach_lara(policy, OwnLam(), -2, align_weight=1.0, lam_weight=1.0)
    # as lerobot-train has it; called by its forward, as lerobot-train does
    model = nn.parallel.DistributedDataParallel(policy, find_unused_parameters=True)
    for _ in range(2):
        model.zero_grad()
        step(model, _share(rank, name), rank)[0].backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


def _share(rank: int, name: str) -> dict:
    batch = make_batch(name, seed=rank)
    batch[f"{FRAMES}_valid"] = torch.tensor([True, rank == 0])
    return batch


@pytest.mark.parametrize("name", [pytest.param("pi05", marks=pytest.mark.long), "vla_jepa"])
def test_ddp_gradients_are_the_mean_over_ranks(name):
    from helpers.ranks import run_ranks

    alone = []
    for rank in range(2):
        policy = make_policy(name)
        torch.manual_seed(0)
        attach_lara(policy, OwnLam(), -2, align_weight=1.0, lam_weight=1.0)
        step(policy, _share(rank, name), rank)[0].backward()
        alone.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    for found in run_ranks(_on_a_rank, name):
        for parameter_name, gradient in alone[0].items():
            expected = (gradient + alone[1][parameter_name]) / 2
            torch.testing.assert_close(found[parameter_name], expected, atol=1e-6, rtol=1e-4, msg=parameter_name)


# ---------------------------------------------------------------------- no trace


@every_policy
def test_weights_zero_train_bit_identically(name):
    stock = make_policy(name)
    policy = copy.deepcopy(stock)
    attach_lara(policy, OwnLam(), align_weight=0.0, lam_weight=0.0)
    losses = []
    for trained in (stock, policy):
        optimizer = own_optimizer(trained)
        for seed in range(2):
            optimizer.zero_grad()
            # with weights 0 the frames may be there or not
            loss, metrics = step(trained, make_batch(name, seed=seed, frames=trained is policy and seed == 0), seed)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            assert not any("lara" in key for key in metrics or ())
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])
    with_lara = dict(policy.named_parameters())
    for parameter_name, parameter in stock.named_parameters():
        twin = with_lara[parameter_name]
        assert torch.equal(parameter, twin), parameter_name
        assert (parameter.grad is None) == (twin.grad is None), parameter_name
        assert parameter.grad is None or torch.equal(parameter.grad, twin.grad), parameter_name


@every_policy
def test_inference_is_bit_identical(name):
    stock, batch = make_policy(name), make_batch(name)
    policy = copy.deepcopy(stock)
    lara = attach_lara(policy, OwnLam())
    step(policy, batch)[0].backward()
    plain = {key: value for key, value in batch.items() if "lara" not in key}
    for mode in ("eval", "no_grad", "disabled"):
        stock.train(mode != "eval")
        policy.train(mode != "eval")
        without = contextlib.nullcontext() if mode == "eval" else torch.no_grad()
        with without, lara.disabled() if mode == "disabled" else contextlib.nullcontext():
            expected, got = step(stock, plain), step(policy, batch)
        assert torch.equal(expected[0], got[0])
        assert expected[1] == got[1]
    for call in ("select_action", "predict_action_chunk"):
        if (name, call) == ("multi_task_dit", "predict_action_chunk"):
            continue  # it samples from the queues that select_action fills
        actions = []
        for sampled in (stock, policy):
            sampled.reset()
            torch.manual_seed(3)
            actions.append(getattr(sampled, call)(without_action(name, batch)))
        assert torch.equal(*actions)


def fingerprint(policy: nn.Module) -> dict:
    return {
        "class": type(policy),
        "modules": [path for path, _ in policy.named_modules()],
        "state": {key: tuple(value.shape) for key, value in policy.state_dict().items()},
        "flags": {path: p.requires_grad for path, p in policy.named_parameters()},
        "modes": {path: m.training for path, m in policy.named_modules()},
        "hooks": {path: [len(v) for k, v in sorted(vars(m).items()) if k.endswith(("hooks", "hooks_with_kwargs"))]
                  for path, m in policy.named_modules()},
        "signature": str(inspect.signature(policy.forward)),
        "own": sorted(policy.__dict__),
    }  # fmt: skip


@every_policy
def test_detach_leaves_no_trace(name):
    policy, batch = make_policy(name), make_batch(name)
    step(policy, make_batch(name, frames=False))  # a first forward leaves hooks and modes of the host's own
    before = fingerprint(policy)
    lara = attach_lara(policy, OwnLam())
    assert str(inspect.signature(policy.forward)) == before["signature"]
    step(policy, batch)[0].backward()
    lara.detach()
    assert fingerprint(policy) == before
    stock, plain = make_policy(name), make_batch(name, frames=False)
    assert torch.equal(step(stock, plain)[0], step(policy, plain)[0])


@every_policy
def test_copies_are_policies_of_their_own(name):
    """EMA, a teacher, what is handed to evaluation: taken between forward and backward."""
    policy, batch = make_policy(name), make_batch(name)
    lara = attach_lara(policy, OwnLam())
    loss, _ = step(policy, batch)
    bare, twin = lara.detached_copy(), copy.deepcopy(policy)
    assert not any(isinstance(module, LaraAdapter) for module in bare.modules())
    assert bare.state_dict().keys() == make_policy(name).state_dict().keys()
    twin_loss, _ = step(twin, batch)
    assert torch.equal(twin_loss, loss)
    twin_loss.backward()
    assert lara.projector[0].weight.grad is None  # the copy trains its own adapter
    loss.backward()
    assert lara.projector[0].weight.grad.any()
    assert lara.step == 1
    actions = []
    for sampled in (bare, policy):
        sampled.reset()
        torch.manual_seed(3)
        actions.append(sampled.select_action(without_action(name, batch)))
    assert torch.equal(*actions)


@every_policy
def test_the_policy_never_sees_the_frames(name, monkeypatch):
    policy, batch = make_policy(name), make_batch(name)
    batch[f"{FRAMES}_valid"] = torch.tensor([True, False])
    host, seen = type(policy).forward, []

    @functools.wraps(host)
    def forward(self, batch, *args, **kwargs):
        seen.append(set(batch))
        return host(self, batch, *args, **kwargs)

    monkeypatch.setattr(type(policy), "forward", forward)
    stock = copy.deepcopy(policy)
    lara = attach_lara(policy, OwnLam(), add_to_loss=False)
    given = dict(batch)
    loss, _ = step(policy, batch)
    assert lara.metrics()["valid_fraction"] == 0.5  # the flags did arrive
    policy.eval()
    step(policy, batch)  # in evaluation neither
    assert batch.keys() == given.keys()  # the caller's batch is left alone
    assert len(seen) == 2
    assert not any("lara" in key for keys in seen for key in keys)
    plain = {key: value for key, value in batch.items() if "lara" not in key}
    assert seen[0] == seen[1] == set(plain)
    # the same noise, the same loss: neither the future nor LARA's own draws reached the policy
    assert torch.equal(step(stock, plain)[0], loss)


@every_policy
def test_a_training_batch_without_frames_is_refused_by_the_key_that_lerobot_keeps(name):
    policy = make_policy(name)
    attach_lara(policy, OwnLam())
    with pytest.raises(FrameError, match=r"no 'observation\.lara\.frames'"):
        step(policy, make_batch(name, frames=False))


# ---------------------------------------------------------------------- which token, which row


@every_policy
def test_the_last_valid_action_step_of_each_sample_is_aligned(name):
    tiny, lengths = POLICIES[name], [HORIZON, 5, 0, 1]
    policy, batch = make_policy(name), pad(make_batch(name, 4), lengths)
    lara = attach_probe(policy, OwnLam(), align_weight=1.0)
    tapped, hidden = policy.get_submodule(lara.config.tap), []
    if lara.config.tap_kind == "output":
        tapped.register_forward_hook(lambda module, args, output: hidden.append(output))
    else:
        tapped.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    step(policy, batch)
    state = hidden[0]
    given = lara.projector.given  # [draws, samples, width]
    assert list(given.shape) == [tiny.draws, 4, state.shape[-1]]
    touched = torch.autograd.grad(lara.losses.align, state)[0].ne(0).any(-1)
    expected = torch.zeros_like(touched)
    for draw in range(tiny.draws):
        for sample, length in enumerate(lengths):
            row = draw * 4 + sample
            if length:
                position = tiny.offset + length - 1
                expected[row, position] = True
                assert torch.equal(given[draw, sample], state[row, position].to(given.dtype))
    assert torch.equal(touched, expected)
    assert lara.metrics()["valid_fraction"] == 0.75


@every_policy
@pytest.mark.parametrize("flags", [[True, True, True], [True, False, True]])
def test_the_terms_are_the_hand_computed_ones(name, flags):
    tiny, lengths = POLICIES[name], [3, HORIZON, 0]
    policy, batch = make_policy(name), pad(make_batch(name, 3), lengths)
    batch[f"{FRAMES}_valid"] = torch.tensor(flags)
    lam = OwnLam()
    lara = attach_probe(policy, lam, align_weight=0.3, lam_weight=0.2)
    step(policy, batch)
    frames = batch[FRAMES]
    latent = lam.encode(frames[:, 0], frames[:, 1]).continuous.flatten(1)
    rows = [
        1 - F.cosine_similarity(lara.projector.gave[draw, sample], latent[sample], dim=0)
        for draw in range(tiny.draws)
        for sample in range(3)
        if flags[sample] and lengths[sample]
    ]
    torch.testing.assert_close(lara.losses.align, torch.stack(rows).mean())
    kept = frames[[sample if flag else 0 for sample, flag in enumerate(flags)]]  # in place of a pair that is not real
    torch.testing.assert_close(lara.losses.lam, lam(kept[:, 0], kept[:, 1]).loss)
    torch.testing.assert_close(lara.losses.total, 0.3 * lara.losses.align + 0.2 * lara.losses.lam)


def test_vla_jepa_tiles_its_noise_draws():
    """The order that the table says: row j * B + i of the action head is sample i."""
    policy, batch = make_policy("vla_jepa"), make_batch("vla_jepa", 3)
    rows = []
    policy.model.action_model.register_forward_pre_hook(lambda module, args: rows.append(args[1]))
    step(policy, {key: value for key, value in batch.items() if "lara" not in key})
    assert torch.equal(rows[0].unflatten(0, (8, 3)), batch["action"].expand(8, -1, -1, -1))


@every_policy
def test_a_batch_without_a_valid_pair_trains_on(name):
    policy, batch = make_policy(name), make_batch(name)
    batch[f"{FRAMES}_valid"] = torch.tensor([False, False])
    lara = attach_lara(policy, OwnLam())
    loss, _ = step(policy, batch)
    loss.backward()
    assert lara.losses.total == 0
    assert all(p.grad is not None and not p.grad.any() for p in lara.parameters())


# ---------------------------------------------------------------------- what comes back


@every_policy
def test_loss_and_metrics(name):
    stock, batch = make_policy(name), make_batch(name)
    policy = copy.deepcopy(stock)
    lara = attach_lara(policy, OwnLam(), align_weight=0.3, lam_weight=0.2)
    alone, host_metrics = step(stock, {key: value for key, value in batch.items() if "lara" not in key})
    loss, metrics = step(policy, batch)
    assert (host_metrics is None) == (name == "multi_task_dit")
    torch.testing.assert_close(loss, alone + lara.losses.total)
    added = {key: value for key, value in metrics.items() if key.startswith("lara/")}
    assert {"lara/align_loss", "lara/lam_loss", "lara/cosine", "lara/valid_fraction"} <= added.keys()
    assert all(type(value) is float for value in added.values())  # LeRobot logs numbers and drops the rest
    assert {key: value for key, value in metrics.items() if key not in added} == (host_metrics or {})


@pytest.mark.parametrize("name", BYPASSING)
def test_one_loss_per_sample(name):
    """LeRobot weights samples itself with reduction="none"."""
    stock, batch = make_policy(name), pad(make_batch(name, 3), [HORIZON, 4, 0])
    policy = copy.deepcopy(stock)
    lara = attach_lara(policy, OwnLam(), align_weight=0.3, lam_weight=0.2)
    plain = {key: value for key, value in batch.items() if "lara" not in key}
    alone, _ = step(stock, plain, reduction="none")
    losses, metrics = step(policy, batch, reduction="none")
    assert losses.shape == alone.shape == (3,)
    share = losses - alone
    torch.testing.assert_close(share.mean(), lara.losses.total)
    torch.testing.assert_close(share[2], 0.2 * lara.losses.lam)  # no action to align
    assert share[0] > share[2]
    assert type(metrics["lara/align_loss"]) is float
    losses.mean().backward()
    assert lara.projector[0].weight.grad.any()


# ---------------------------------------------------------------------- peft


@every_policy
def test_lora(name):
    peft = pytest.importorskip("peft")
    base = make_policy(name)
    base.config.pretrained_path = "base"  # LeRobot refuses LoRA from scratch
    pattern = POLICIES[name].lora
    if pattern is None:
        policy = base.wrap_with_peft(peft_cli_overrides={"r": 2})
    else:
        policy = base.wrap_with_peft(peft.LoraConfig(r=2, target_modules=pattern))
    lara = attach_lara(policy, OwnLam(), -1, align_weight=0.5)
    optimizer = own_optimizer(policy)
    assert lara.check(make_batch(name), optimizer).ok
    frozen = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    step(policy, make_batch(name))
    lara.losses.total.backward()
    reached = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert all("lora_" in n or "lara." in n for n in reached)
    assert {n.partition("lara.")[2].partition(".")[0] for n in reached if "lara." in n} == {"projector", "lam"}
    assert any("lora_B" in n for n in reached)  # lora_A waits for the first step: lora_B starts at zero
    assert not any("lora" in n for n, _ in lara.named_parameters())
    loss, metrics = step(policy, make_batch(name))
    assert "lara/cosine" in metrics
    loss.backward()
    optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)
    lara.detach()
    assert not any("lara" in n for n, _ in policy.named_modules())
    policy.eval()
    torch.manual_seed(0)
    assert policy.select_action(without_action(name, make_batch(name))).isfinite().all()


# ---------------------------------------------------------------------- precision


def assert_trains_in_float32(policy: nn.Module, lara, loss: torch.Tensor) -> None:
    loss.backward()
    assert loss.isfinite()
    for n, p in lara.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32, n
        assert p.grad.isfinite().all(), n
    assert lara.losses.align.dtype == lara.losses.lam.dtype == torch.float32
    assert any(p.grad.any() for p in lara.projector.parameters())
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


@every_policy
def test_bf16_autocast(name):
    policy, batch = make_policy(name), make_batch(name)
    lara = attach_probe(policy, OwnLam(), align_weight=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = step(policy, batch)
    assert_trains_in_float32(policy, lara, loss)
    assert lara.projector.gave.dtype == torch.float32  # a Linear under autocast gives bfloat16


@pytest.mark.parametrize("name", ["pi0", "pi05", "xvla"])
def test_bfloat16_policy(name):
    policy = make_policy(name, dtype="bfloat16")
    lara = attach_lara(policy, OwnLam(), align_weight=0.5)
    block = policy.get_submodule(lara.config.blocks)[0]
    assert {p.dtype for n, p in block.named_parameters() if "mlp" in n} == {torch.bfloat16}
    loss, _ = step(policy, make_batch(name))
    assert_trains_in_float32(policy, lara, loss)


@every_policy
def test_accelerate_in_bf16(name):
    """What lerobot-train does around the policy."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        policy = make_policy(name)
        lara = attach_lara(policy, OwnLam(), align_weight=0.5)
        prepared, optimizer = accelerator.prepare(policy, own_optimizer(policy))
        before = lara.projector[0].weight.detach().clone()
        with accelerator.autocast():
            loss, metrics = step(prepared, make_batch(name))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 10.0)
        optimizer.step()
        assert "lara/align_loss" in metrics
        assert lara.projector[0].weight.dtype == torch.float32
        assert not torch.equal(lara.projector[0].weight, before)
        assert accelerator.unwrap_model(prepared) is policy
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------- these tests themselves


def test_the_tiny_builds_leave_lerobot_as_it_was():
    import lerobot.policies.groot.groot_n1_7 as groot
    import lerobot.policies.pi0.modeling_pi0 as pi0
    import lerobot.policies.vla_jepa.modeling_vla_jepa as vla_jepa

    for name in NAMES:
        make_policy(name)
    assert pi0.get_gemma_config("gemma_300m").width == 1024
    assert "paligemma" in pi0.CONFIG_MAPPING
    assert groot.GR00TN17.from_pretrained.__func__.__module__ != lerobot_tiny.__name__
    assert vla_jepa.Qwen3VLInterface.__module__.startswith("lerobot.")
    assert make_batch("pi0")[FRAMES].shape == (2, 2, 3, SIZE, SIZE)
