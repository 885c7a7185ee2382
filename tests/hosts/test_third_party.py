"""LARA on action heads of other projects, their own code built tiny: where the actions are is proved by moving them."""

from __future__ import annotations

import copy
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

if not os.environ.get("LARA_HEADS_SRC"):
    pytest.skip("LARA_HEADS_SRC=FOLDER with the checkouts: make test-heads", allow_module_level=True)

from helpers.heads import HEADS, HORIZON, SIZE, Head, Recorder, actions_of, build, changes, move, with_frames

from lara_adapter import (
    LaraAdapter,
    LatentActionConfig,
    LatentActionModel,
    OptimizerCoverageError,
    TapNotFound,
    TokenError,
    attach_lara,
    load_lara,
)
from lara_adapter.heads import find_blocks
from lara_adapter.hostcall import host_loss
from lara_adapter.policies import GENERIC, find_spec

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autocast"),  # starVLA asks for CUDA's
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),  # outside of Lightning's trainer
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept"),  # numpy on tensors, in RDT
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
]

SIZE_OF_BATCH = 3
every_head = pytest.mark.parametrize("name", list(HEADS))
PADDED = ["dexvla_scaledp", "dexvla", "evo1", "eo1"]  # the others have no key of padded steps
OF_ITS_OWN = [name for name in HEADS if name.startswith("diffusion_policy")]  # its optimizer lists its network alone


def attached(head: Head, **arguments) -> tuple[nn.Module, LaraAdapter]:
    """A copy of the policy with LARA, told nothing but the layer."""
    policy = copy.deepcopy(head.policy)
    torch.manual_seed(1)
    lam = LatentActionModel(LatentActionConfig.tiny(image_size=SIZE))
    return policy, attach_lara(policy, lam, layer=-3, **arguments)


def loss_of(head: Head, output: object) -> torch.Tensor:
    return host_loss(output, find_spec(head.policy).loss)


def given(head: Head, batch: object) -> object:
    """What lara.check takes."""
    return (batch, *head.more) if head.more else batch


def touched(head: Head, policy: nn.Module, lara: LaraAdapter, batch: object) -> torch.Tensor:
    """Which [row, position] of the state after block L-2 gets a gradient from the alignment; the runs are joined."""
    blocks = policy.get_submodule(head.blocks)
    with Recorder(blocks[len(blocks) - 3], "output") as states:
        head.call(policy, batch)
    gradients = torch.autograd.grad(lara.losses.align, states)
    return torch.cat([gradient.ne(0).any(-1) for gradient in gradients])


# ---------------------------------------------------------------------- what is true of the host, without LARA


@every_head
def test_moving_the_last_action_moves_one_token_of_each_row(name):
    head = build(name)
    moved = changes(head, head.policy, lambda actions: [move(action[-1:]) for action in actions], SIZE_OF_BATCH)
    assert list(moved.shape) == [head.draws * SIZE_OF_BATCH, head.length]
    for sample in range(SIZE_OF_BATCH):
        for row in head.rows_of(sample, SIZE_OF_BATCH):
            assert moved[row].nonzero().flatten().tolist() == [head.token_of(sample)]


@every_head
def test_moving_one_sample_moves_its_rows(name):
    head = build(name)
    for sample in (0, SIZE_OF_BATCH - 1):
        moved = changes(head, head.policy, lambda actions, sample=sample: move(actions[sample]), SIZE_OF_BATCH)
        assert moved.any(1).nonzero().flatten().tolist() == head.rows_of(sample, SIZE_OF_BATCH)


# ---------------------------------------------------------------------- LARA agrees


@every_head
def test_one_step_with_no_more_than_the_row(name):
    head = build(name)
    assert find_spec(head.policy) is not GENERIC
    alone = loss_of(head, head.call(copy.deepcopy(head.policy), head.batch()))
    policy, lara = attached(head)
    assert (lara.config.blocks, lara.config.depth) == (head.blocks, 4)
    output = head.call(policy, with_frames(head.batch(), head))
    assert type(output) is type(head.call(copy.deepcopy(head.policy), head.batch()))
    loss = loss_of(head, output)
    assert lara.step == 1
    torch.testing.assert_close(loss, alone + lara.losses.total.to(alone.dtype))
    assert lara.losses.total > 0
    loss.backward()
    assert lara.projector[0].weight.grad.any()


@every_head
def test_the_gradient_is_at_the_action_that_was_moved(name):
    head = build(name)
    policy, lara = attached(head)
    found = touched(head, policy, lara, with_frames(head.batch(), head))
    moved = changes(head, head.policy, lambda actions: [move(action[-1:]) for action in actions], SIZE_OF_BATCH)
    assert torch.equal(found, moved)


@every_head
@pytest.mark.parametrize("sample", [0, SIZE_OF_BATCH - 1])
def test_a_pair_of_frames_reaches_the_rows_of_its_sample(name, sample):
    head = build(name)
    policy, lara = attached(head)
    valid = [index == sample for index in range(SIZE_OF_BATCH)]
    found = touched(head, policy, lara, with_frames(head.batch(), head, valid))
    assert found.any(1).nonzero().flatten().tolist() == head.rows_of(sample, SIZE_OF_BATCH)


@pytest.mark.parametrize("name", PADDED)
def test_padding_moves_the_token(name):
    head = build(name)
    policy, lara = attached(head)
    batch, lengths = head.batch(), [HORIZON, 5, 2]
    batch[head.padding] = torch.arange(HORIZON)[None] >= torch.tensor(lengths)[:, None]
    found = touched(head, policy, lara, with_frames(batch, head))
    for sample, length in enumerate(lengths):
        for row in head.rows_of(sample, SIZE_OF_BATCH):
            assert found[row].nonzero().flatten().tolist() == [head.token_of(sample) - HORIZON + length]


@every_head
def test_check_proves_token_and_rows(name):
    head = build(name)
    _, lara = attached(head)
    report = lara.check(given(head, with_frames(head.batch(), head)))
    assert report.ok, report
    assert report.proven, report
    positions = sorted({head.token_of(sample) for sample in range(SIZE_OF_BATCH)})
    where = f"token {positions[0]}" if len(positions) == 1 else f"tokens {positions[0]} to {positions[-1]}"
    assert report.token == f"{where} of {head.length}: proven"
    assert report.rows == (f"proven ({head.draws} draws, tile)" if head.draws > 1 else "proven")


# name -> what is changed in its row, what lara.check says of it
WRONG_ROWS = {
    "eo1": ({"action_tokens": "last"}, "but token 18 is aligned"),
    "rdt": ({"action_tokens": "first"}, r"action_tokens='last'"),
    "cogact": ({"draws": "interleave"}, r"draws='tile'"),
    "starvla_pi": ({"draws": "interleave"}, r"draws='tile'"),
    "dexvla": ({"blocks": "model.layers"}, "do not see the action"),
}


@pytest.mark.parametrize("name", list(WRONG_ROWS))
def test_check_refuses_a_wrong_row(name):
    head, (change, problem) = build(name), WRONG_ROWS[name]
    _, lara = attached(head, spec=replace(find_spec(head.policy), **change))
    report = lara.check(given(head, with_frames(head.batch(), head)))
    assert not report.proven
    assert re.search(problem, "\n".join(report.problems)), report


@every_head
def test_structure_alone_finds_the_blocks_or_none(name):
    head = build(name)
    if name == "eo1":  # its actions run through the language model
        with pytest.raises(TapNotFound, match=re.escape(head.blocks)):
            find_blocks(head.policy)
    else:
        assert find_blocks(head.policy) == head.blocks


def test_a_head_that_sees_fewer_steps_than_the_batch_has():
    """Diffusion Policy can be told to predict only the steps that it executes: the last of the batch has no token."""
    from helpers.heads import diffusion_policy

    head = diffusion_policy.build(pred_action_steps_only=True)
    assert not changes(head, head.policy, lambda actions: [move(action[-1:]) for action in actions]).any()
    batch = with_frames(head.batch(), head)
    policy, lara = attached(head)
    with pytest.raises(TokenError, match="rows of 4 tokens, but the batch has 3 rows of 8 action steps"):
        head.call(policy, batch)
    policy, lara = attached(head, token=lambda hidden, batch: hidden[:, -1])
    found = touched(head, policy, lara, batch)
    assert found.nonzero().tolist() == [[row, 3] for row in range(SIZE_OF_BATCH)]
    assert not lara.check(batch).proven  # step 7 has no token: which one stands for it is the user's choice


# ---------------------------------------------------------------------- optimizer, evaluation, no trace


@every_head
def test_the_hosts_own_optimizer(name):
    head = build(name)
    policy, lara = attached(head)
    optimizer = head.optimizer(policy) if head.optimizer else torch.optim.AdamW(policy.parameters())
    batch = with_frames(head.batch(), head)
    if name in OF_ITS_OWN:
        with pytest.raises(OptimizerCoverageError):
            lara.check(given(head, batch), optimizer)
        optimizer.add_param_group({"params": lara.parameters()})
    assert lara.check(given(head, batch), optimizer).ok
    before = lara.projector[0].weight.detach().clone()
    loss_of(head, head.call(policy, batch)).backward()
    optimizer.step()
    assert not torch.equal(lara.projector[0].weight, before)


@every_head
def test_sampling_is_the_same_with_lara(name):
    head = build(name)
    stock = copy.deepcopy(head.policy).eval()
    policy, lara = attached(head)
    actions = head.sample(policy.eval())
    assert actions.isfinite().all()
    assert torch.equal(actions, head.sample(stock))
    assert lara.step == 0


@every_head
def test_idle_or_detached_lara_changes_nothing(name):
    head = build(name)
    alone = loss_of(head, head.call(copy.deepcopy(head.policy), head.batch()))
    policy, lara = attached(head, align_weight=0.0, lam_weight=0.0)
    assert torch.equal(loss_of(head, head.call(policy, with_frames(head.batch(), head))), alone)
    lara.detach()
    assert policy.state_dict().keys() == head.policy.state_dict().keys()
    assert torch.equal(loss_of(head, head.call(policy, head.batch())), alone)


@every_head
def test_saved_and_loaded(name, tmp_path):
    head = build(name)
    policy, lara = attached(head)
    batch = with_frames(head.batch(), head)
    head.call(policy, batch)
    lara.save_pretrained(tmp_path / "adapter")
    again = copy.deepcopy(head.policy)
    loaded = load_lara(again, tmp_path / "adapter")
    assert (loaded.config.blocks, loaded.config.layer) == (lara.config.blocks, lara.config.layer)
    assert loaded.step == 1
    assert torch.equal(loss_of(head, head.call(again, batch)), loss_of(head, head.call(policy, batch)))


@every_head
def test_a_copy_of_the_policy_has_an_adapter_of_its_own(name):
    """EMA and teachers are deep copies, in most of these projects."""
    head = build(name)
    policy, lara = attached(head)
    twin, batch = copy.deepcopy(policy), with_frames(head.batch(), head)
    loss_of(head, head.call(twin, batch)).backward()
    assert lara.step == 0
    assert lara.projector[0].weight.grad is None
    owner = twin.get_submodule(find_spec(policy).owner)
    assert owner.lara.step == 1
    assert owner.lara.projector[0].weight.grad.any()


def test_gradient_checkpointing_of_eo1_gives_the_same_gradients():
    """Its language model runs inside a checkpoint, and the layers inside checkpoints of their own."""
    from helpers.heads import lerobot_main

    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        head = lerobot_main.build_eo1(gradient_checkpointing=checkpointing)
        policy, lara = attached(head, align_weight=1.0)
        loss_of(head, head.call(policy, with_frames(head.batch(), head))).backward()
        assert lara.step == 1
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("name", ["flower", "mdt_v"])
def test_lightning_trains_it(name, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    head = build(name)
    policy, lara = attached(head)
    before = lara.projector[0].weight.detach().clone()
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    batches = [with_frames(head.batch(seed=seed), head) for seed in range(2)]
    trainer.fit(policy, torch.utils.data.DataLoader(batches, batch_size=None))
    assert lara.step == 2
    assert not torch.equal(lara.projector[0].weight, before)


# ---------------------------------------------------------------------- these tests themselves


def test_the_checkouts_leave_no_modules_behind():
    root = os.path.realpath(os.environ["LARA_HEADS_SRC"])
    for name in HEADS:
        build(name)
        assert len(actions_of(build(name).batch(), build(name).action)) == SIZE_OF_BATCH
    left = [
        n for n, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(f"{root}{os.sep}")
    ]
    assert not left
    assert not any(path.startswith(root) for path in sys.path)


# ---------------------------------------------------------------------- the documented table


def documented_rows() -> dict[str, list[str]]:
    text = (Path(__file__).parents[2] / "docs" / "your-policy.md").read_text()
    table = text.split("<!-- heads: begin -->")[1].split("<!-- heads: end -->")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return {row[1]: row[2:] for row in rows}


@pytest.mark.parametrize("name", documented_rows())
def test_the_table_of_the_page(name):
    head = build(name)
    source, entry, token, rows = documented_rows()[name]
    _, lara = attached(head)
    report = lara.check(given(head, with_frames(head.batch(), head)))
    draws = "proven" if rows == "one a sample" else f"proven ({rows})"
    assert (head.source, lara.spec.entry) == (source, entry)
    assert (report.token, report.rows) == (f"{token}: proven", draws)
    assert report.proven
