"""LARA in one file: train a policy together with a latent action model, save both, load them, act.

    python examples/quickstart.py        # under two minutes on two CPU cores; no simulator, no download

The world is a picture: a red square moves to a green one. The policy sees the picture and its own position, and predicts
the next eight moves. Replace `make_batch` by your data and `MiniVLA` by your policy; the lines marked # LARA stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mini_vla import MiniVLA, MiniVLAConfig
from torch import Tensor

from lara_adapter import LaraAdapter, LatentActionConfig, LatentActionModel, attach_lara, load_lara

SIZE, SQUARE, HORIZON, BATCH = 32, 6, 8, 32  # pixels, pixels, actions in a chunk, rows in a batch


def draw(red: Tensor, green: Tensor) -> Tensor:
    """Draw two squares at positions [B, 2] in [0, 1]: uint8 [B, 3, H, W]."""
    image = torch.full((len(red), 3, SIZE, SIZE), 20, dtype=torch.uint8)
    for channel, position in enumerate((red, green)):
        first = (position * (SIZE - SQUARE)).round()[:, :, None]
        inside = (torch.arange(SIZE) >= first) & (torch.arange(SIZE) < first + SQUARE)  # [B, 2, SIZE]
        image[:, channel][inside[:, 0, :, None] & inside[:, 1, None, :]] = 230
    return image


def make_batch(random: torch.Generator) -> dict[str, Tensor]:
    """Demonstrations: the red square moves towards the green one."""
    start, goal = torch.rand(2, BATCH, 2, generator=random)
    position, actions = start, []
    for _ in range(HORIZON):
        actions.append((4 * (goal - position)).clamp(-1, 1))
        position = position + actions[-1] / 16
    now, future = draw(start, goal), draw(position, goal)
    return {
        "image": now,  # uint8 [B, 3, H, W]
        "state": start,  # float [B, 2]
        "task": torch.zeros(BATCH, dtype=torch.long),  # [B]; there is only one
        "action": torch.stack(actions, 1),  # float in [-1, 1], [B, HORIZON, 2]
        "action_mask": torch.ones(BATCH, HORIZON, 2),
        "lara_frames": torch.stack([now, future], 1),  # LARA: the frame now and the frame HORIZON steps later
    }


def new_policy() -> MiniVLA:
    """A small flow-matching diffusion transformer with random weights."""
    return MiniVLA(MiniVLAConfig(action_dim=2, horizon=HORIZON, state_dim=2, num_tasks=1, image_size=SIZE, width=64))


def train(
    policy: MiniVLA, lara: LaraAdapter, optimizer: torch.optim.Optimizer, steps: int, data: torch.Generator
) -> None:
    """Run an ordinary training loop; nothing in it knows of LARA but the line that prints."""
    policy.train()
    for step in range(1, steps + 1):
        loss = policy(make_batch(data))["loss"]  # LARA: L_ACT + w1 L_LARA + w2 L_LAM
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 4) == 0:
            shown = lara.metrics()  # LARA
            action_loss = float(loss.detach() - lara.losses.total.detach())
            print(
                f"   step {step}: action loss {action_loss:.3f}, alignment loss {shown['align_loss']:.3f}, "
                f"LAM loss {shown['lam_loss']:.3f}, mean direction {shown['mean_direction']:.2f}"
            )


def main() -> None:
    """Train, save, load, act."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps of the LAM, and of the policy")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="where the adapter is saved")
    arguments = parser.parse_args()
    steps, folder = arguments.steps, arguments.output / "adapter"
    torch.set_num_threads(1)  # the models are tiny: a second thread would mostly wait for the first
    torch.manual_seed(0)
    data, test = torch.Generator().manual_seed(0), make_batch(torch.Generator().manual_seed(1))
    noise = torch.randn(test["action"].shape)  # from which the policy samples its actions

    print("1. A latent action model (LAM) learns from pairs of frames what changed between them. It sees no actions.")
    lam = LatentActionModel(LatentActionConfig.tiny(image_size=SIZE, vq_warmup_steps=steps // 4))
    optimizer = torch.optim.AdamW(lam.parameters(), lr=1e-3)
    for _ in range(steps):
        output = lam(*make_batch(data)["lara_frames"].unbind(1))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    error = float(output.reconstruction_loss.detach() / output.copy_loss)
    print(f"   It predicts the later frame with {error:.2f} times the error of repeating the first one.")

    print("2. LARA is attached to the policy, and one batch shows whether everything is connected:")
    policy = new_policy()
    lara = attach_lara(policy, lam, layer=-3, alignment="contrastive", align_weight=0.1, lam_weight=0.1)  # LARA
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)  # holds LARA's parameters too
    print("  ", str(lara.check(test, optimizer)).replace("\n", "\n   "))
    print("3. The policy and the LAM train together:")
    untrained = (policy.eval().get_action(test, noise) - test["action"]).square().mean()
    train(policy, lara, optimizer, steps, data)
    actions = policy.eval().get_action(test, noise)  # LARA runs in training only
    trained = (actions - test["action"]).square().mean()
    print(f"   Squared error of the actions on new starts: {untrained:.3f} before, {trained:.3f} after.")
    lara.save_pretrained(folder, save_policy="trainable")  # LARA: projector, LAM, and the policy's trained weights
    print(f"4. Saved to {folder}.")
    acting = load_lara(new_policy(), folder, inference=True)  # LARA: the policy alone, in eval mode
    print(f"5. Loaded to act: the same actions: {torch.equal(acting.get_action(test, noise), actions)}.")
    resumed = new_policy()
    lara = load_lara(resumed, folder)  # LARA: everything, to go on training
    print(f"6. Loaded to train on, at step {lara.step}; the optimizer is yours to save and load:")
    train(resumed, lara, torch.optim.AdamW(resumed.parameters(), lr=1e-4), max(1, steps // 8), data)
    before = resumed.eval().get_action(test, noise)
    lara.detach()  # LARA
    same = torch.equal(resumed.get_action(test, noise), before)
    left = sum("lara" in name for name in resumed.state_dict())
    print(f"7. Detached: {left} tensors of LARA are left in the policy; the same actions as before: {same}.")


if __name__ == "__main__":
    main()
