from __future__ import annotations

import pytest
import torch

from examples.mini_vla import DiTBlock, MiniVLA, MiniVLAConfig
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara


def make_batch(size: int = 8) -> dict[str, torch.Tensor]:
    """Two tasks whose actions differ and follow from the state."""
    task = torch.arange(size) % 2
    state = torch.linspace(-1, 1, size * 4).view(size, 4)
    action = (state[:, None, :] * (1 - 2 * task)[:, None, None]).expand(size, 16, 4).contiguous()
    return {
        "image": torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8),
        "state": state,
        "task": task,
        "action": action,
        "action_mask": torch.ones(size, 16, 4),
    }


def test_learns_the_actions_of_a_small_batch_and_samples_them():
    policy, batch = MiniVLA(MiniVLAConfig(width=48, depth=4)), make_batch()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    noise = torch.randn(8, 16, 4)
    untrained = (policy.get_action(batch, noise) - batch["action"]).square().mean()
    for _ in range(200):
        loss = policy(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = (policy.get_action(batch, noise) - batch["action"]).square().mean()
    assert trained < 0.05 < 0.3 < untrained


def test_samples_chunks_in_range_from_given_noise():
    policy, batch = MiniVLA(), make_batch(3)
    noise = torch.randn(3, 16, 4)
    action = policy.get_action(batch, noise)
    assert action.shape == (3, 16, 4)
    assert action.abs().max() <= 1
    assert not action.requires_grad
    assert torch.equal(action, policy.get_action(batch, noise))
    assert not torch.equal(action, policy.get_action(batch, noise + 1))


def test_masked_actions_change_neither_loss_nor_gradient():
    batch = make_batch()
    batch["action_mask"][:, 10:] = 0
    results = []
    for padding in (0.0, 7.0):
        torch.manual_seed(0)
        policy = MiniVLA()
        # padding reaches the network as a token, so only the gradient of the output layer can be free of it
        velocity_target = {
            **batch,
            "action": batch["action"] * batch["action_mask"] + padding * (1 - batch["action_mask"]),
        }
        for block in policy.action_head.model.transformer_blocks:
            torch.nn.init.zeros_(block.attention.to_out.weight)
        torch.manual_seed(1)
        loss = policy(velocity_target)["loss"]
        loss.backward()
        results.append((loss.detach(), policy.action_head.action_decoder.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_has_the_shape_of_gr00t_and_about_the_promised_size():
    policy = MiniVLA()
    blocks = policy.action_head.model.transformer_blocks
    assert len(blocks) == 4
    assert all(isinstance(block, DiTBlock) for block in blocks)
    assert 600_000 < sum(p.numel() for p in policy.parameters()) < 900_000
    seen: list[tuple[int, bool]] = []
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, index=index: seen.append((index, args[2] is not None)))
    policy(make_batch(2))
    assert seen == [(0, True), (1, False), (2, True), (3, False)]


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
def test_lara_finds_the_blocks_by_itself_and_reaches_everything(alignment):
    policy = MiniVLA()
    lam = LatentActionModel(LatentActionConfig.tiny())
    lara = attach_lara(policy, lam, layer=-3, alignment=alignment)
    batch = make_batch(4)
    batch["lara_frames"] = torch.randint(0, 256, (4, 2, 3, 64, 64), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    report = lara.check(batch, optimizer)
    assert report.ok, str(report)
    assert report.tap == "action_head.model.transformer_blocks.1"


def test_sizes_are_read_off_the_weights():
    config = MiniVLAConfig(num_tasks=3, width=48, depth=6)
    state = MiniVLA(config).state_dict()
    assert MiniVLAConfig.from_state_dict(state) == config
    MiniVLA(MiniVLAConfig.from_state_dict(state)).load_state_dict(state)
