"""Where training enters: another method than forward, and what is said when the loop goes past it."""

import copy
import logging
import logging.config
import pickle
import re

import pytest
import torch
from helpers.odd_hosts import Host, make_batch
from helpers.toys import OwnLam
from torch import nn
from torch.utils.checkpoint import checkpoint

from lara_adapter import PolicySpec, TapNotFound, attach_lara, load_lara


class Diffusion(Host):
    """diffusion_policy's way: training calls compute_loss, forward is not defined."""

    forward = nn.Module.forward

    def compute_loss(self, batch, scale: float = 1.0):
        return self.loss_of(batch["state"], batch["action"]) * scale


class Both(Host):
    def compute_loss(self, batch):
        return self.loss_of(batch["state"], batch["action"])

    def training_step(self, batch, batch_idx):
        return self.compute_loss(batch)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Both()

    def forward(self, batch):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        return {"loss": self.model.compute_loss(batch)}


@pytest.mark.parametrize(
    ("policy", "entry", "step"),
    [
        (Diffusion, "compute_loss", lambda p: p.compute_loss(make_batch(), scale=1.0)),
        (Both, "compute_loss", lambda p: p.compute_loss(make_batch())),
        (Both, "training_step", lambda p: p.training_step(make_batch(), 0)),
        (Wrapped, "training_step", lambda p: p.training_step(make_batch(), batch_idx=0)["loss"]),
        (Wrapped, "model.compute_loss", lambda p: p.training_step(make_batch(), 0)["loss"]),
    ],
)
def test_an_entry_that_is_named(policy, entry, step, tmp_path):
    policy = policy().train()
    torch.manual_seed(3)
    plain = step(policy)
    before = {name: set(vars(module)) for name, module in policy.named_modules()}
    lara = attach_lara(policy, OwnLam(), layer=-3, entry=entry)
    torch.manual_seed(3)
    loss = step(policy)
    assert torch.allclose(loss, plain + lara.losses.total)
    loss.backward()
    assert lara.step == 1
    assert lara.projector[0].weight.grad.abs().sum() > 0
    report = lara.check(make_batch())
    assert report.proven
    assert report.ok

    double = copy.deepcopy(policy)
    step(double)
    assert (double.lara.step, lara.step) == (2, 1)
    clean = lara.detached_copy()
    assert not any("lara" in name for name, _ in clean.named_modules())
    with torch.no_grad():
        step(clean)

    lara.save_pretrained(tmp_path / "saved")
    lara.detach()
    assert {name: set(vars(module)) for name, module in policy.named_modules()} == before
    again = load_lara(policy, tmp_path / "saved", lam=OwnLam())
    assert again.spec.entry == entry
    step(policy)
    assert again.step == 2


def test_a_forward_that_is_not_implemented_is_refused():
    class Lightning(nn.Module):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Policy(Lightning):
        def __init__(self):
            super().__init__()
            self.host = Host()

        def training_step(self, batch, batch_idx):
            return self.host(batch)["loss"]

    for policy, name in ((Diffusion(), "compute_loss"), (Wrapped(), "training_step"), (Policy(), "training_step")):
        with pytest.raises(TapNotFound, match=rf"forward is not implemented.*entry='{name}'"):
            attach_lara(policy, OwnLam())
        assert not hasattr(policy, "lara")


@pytest.mark.parametrize("entry", ["no_such", "model.no_such", "nowhere.compute_loss", "model.flow_blocks"])
def test_an_entry_that_is_not_there(entry):
    with pytest.raises(
        TapNotFound, match=rf"entry='{entry}', but Wrapped has no such method; it has \['training_step'\]"
    ):
        attach_lara(Wrapped(), OwnLam(), entry=entry)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "idle" in r.getMessage()]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda p: p.compute_loss(make_batch()), "the loop calls compute_loss, not forward.*entry='compute_loss'"),
        (lambda p: p.training_step(make_batch(), 0), "calls training_step, not forward.*entry='training_step'"),
        (lambda p: p.loss_of(make_batch()["state"], make_batch()["action"]), "calls loss_of"),
        (lambda p: type(p).forward(p, make_batch())["loss"], r"forward was put back.*lara\.rebind\(\)"),
        (lambda p: p.flow_blocks[1](torch.zeros(2, 3, 16)).sum(), "called directly"),
    ],
)
def test_training_past_the_entry_is_said_once(step, said, caplog):
    policy = Both().train()
    lara = attach_lara(policy, OwnLam(), layer=-3)
    policy(make_batch())
    assert lara.metrics()
    for _ in range(3):
        step(policy).backward()
    (warning,) = warnings_of(caplog)
    assert re.search(said, warning), warning
    assert lara.metrics() == {}  # never the old values as new
    assert lara.step == 1
    policy(make_batch())
    assert lara.metrics()


def test_a_host_that_silences_all_loggers_does_not_silence_ours(caplog):
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})
    policy = Both().train()
    attach_lara(policy, OwnLam(), layer=-3)
    policy.compute_loss(make_batch())
    assert warnings_of(caplog)


def test_what_is_no_training_is_not_warned_of(caplog):
    policy = Both().train()
    lara = attach_lara(policy, OwnLam(), layer=-3)
    with torch.no_grad():
        policy.compute_loss(make_batch())
    with lara.disabled():
        policy(make_batch())["loss"].backward()
    policy.eval()
    policy.compute_loss(make_batch())
    policy.train()

    class Checkpointed(Host):
        def trunk(self, x):
            for block in self.flow_blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    other = Checkpointed().train()
    attach_lara(other, OwnLam(), layer=-3)
    other(make_batch())["loss"].backward()  # recomputes the blocks
    idle = Both().train()
    attach_lara(idle, OwnLam(), layer=-3, align_weight=0.0, lam_weight=0.0)
    idle.compute_loss(make_batch())
    assert warnings_of(caplog) == []


def test_eval_mode_with_a_loss_that_has_a_graph(caplog):
    policy = Host()
    lara = attach_lara(policy.train(), OwnLam(), layer=-3)
    policy(make_batch())["loss"].backward()
    policy.eval()
    with torch.no_grad():
        policy(make_batch())
    assert warnings_of(caplog) == []
    assert lara.metrics()["align_loss"] > 0  # an evaluation without gradient keeps the last step's
    for _ in range(2):
        policy(make_batch())["loss"].backward()
    (warning,) = warnings_of(caplog)
    assert "Host is in eval mode" in warning
    assert "policy.train()" in warning
    assert lara.metrics() == {}
    assert len(lara.history.points) == 1


def test_rebind_after_something_put_the_policys_own_forward_back(caplog):
    policy = Host().train()
    lara = attach_lara(policy, OwnLam(), layer=-3)
    del policy.__dict__["forward"]
    policy(make_batch())
    assert "rebind" in warnings_of(caplog)[0]
    lara.rebind()
    policy(make_batch())
    assert lara.step == 1


def test_an_unpickled_policy_refuses_to_train_past_its_entry():
    from lara_adapter import AttachOrderError

    policy = Both().train()
    attach_lara(policy, OwnLam(), layer=-3, entry="compute_loss")
    again = pickle.loads(pickle.dumps(policy))
    with pytest.raises(AttachOrderError, match="rebind"):
        again.compute_loss(make_batch())
    again.lara.rebind()
    again.compute_loss(make_batch())
    assert again.lara.step == 1


def test_a_row_with_an_entry():
    lara = attach_lara(Diffusion().train(), OwnLam(), layer=-3, spec=PolicySpec("mine", entry="compute_loss"))
    lara.policy.compute_loss(make_batch())
    assert lara.step == 1


def test_lightning_trains_through_training_step(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.host = Host()

        def training_step(self, batch, batch_idx):
            return self.host.loss_of(batch["state"], batch["action"])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    module = Module()
    lara = attach_lara(module, OwnLam(), layer=-3, entry="training_step")
    batch = make_batch(8)
    data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    before = lara.projector[0].weight.clone()
    off = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = lightning.Trainer(max_steps=3, accelerator="cpu", devices=1, default_root_dir=tmp_path, **off)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert lara.step == 3
    assert not torch.equal(before, lara.projector[0].weight)
