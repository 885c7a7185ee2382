"""Inside transformers.Trainer, at 4.51 (GR00T's) and 5.x."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.models import TINY, FixedDit
from helpers.toys import make_batch

from lara_adapter import AttachOrderError, FrameError, LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.schedules import Warmup

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lara_adapter.integrations.trainer import LaraCallback, LaraTrainerMixin  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402


class Rows(torch.utils.data.Dataset):
    def __init__(self, size: int = 32) -> None:
        self.batch = make_batch(size, seed=5)

    def __len__(self) -> int:
        return len(self.batch["state"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


class Host(FixedDit):
    """GR00T's call: model(inputs={...}) with a dict loss."""

    def forward(self, inputs):
        return super().forward(inputs)


class OutputHost(FixedDit):
    def forward(self, inputs):
        return transformers.utils.ModelOutput(loss=super().forward(inputs)["loss"])


class TupleHost(FixedDit):
    def forward(self, inputs):
        return (super().forward(inputs)["loss"],)


class KeywordHost(FixedDit):
    def forward(self, state, action, action_mask=None):
        return super().forward({"state": state, "action": action, "action_mask": action_mask})


def collate(rows):
    return {"inputs": {name: torch.stack([row[name] for row in rows]) for name in rows[0]}}


def collate_flat(rows):
    return collate(rows)["inputs"]


def build(host=Host, weight=0.3, lam_weight=0.2, **arguments):
    torch.manual_seed(0)
    policy = host().train()
    lam = LatentActionModel(LatentActionConfig.tiny(**{**TINY, "vq_warmup_steps": 3}))
    return policy, attach_lara(policy, lam, align_weight=weight, lam_weight=lam_weight, **arguments)


def trainer_of(policy, folder, collator=collate, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "remove_unused_columns": False, "disable_tqdm": True,
        "use_cpu": True, "seed": 3, **changes,
    }  # fmt: skip
    return Trainer(
        policy, TrainingArguments(**settings), train_dataset=Rows(), eval_dataset=Rows(8), data_collator=collator
    )


@pytest.mark.parametrize("host", [Host, OutputHost, TupleHost, KeywordHost])
def test_every_kind_of_output_trains_and_logs(host, tmp_path):
    policy, lara = build(host)
    before = lara.projector[0].weight.clone()
    trainer = trainer_of(policy, tmp_path, collate_flat if host is KeywordHost else collate)
    LaraCallback.add_to(trainer, lara)
    trainer.train()
    assert not torch.equal(lara.projector[0].weight, before)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all("lara/align_loss" in entry and "lara/codes_used" in entry for entry in logged)
    assert lara.step == 4


class OpenKeywordHost(FixedDit):
    seen: frozenset = frozenset()

    def forward(self, state, action, **kwargs):
        self.seen = frozenset(kwargs)
        return super().forward({"state": state, "action": action})


@pytest.mark.parametrize("host", [KeywordHost, OpenKeywordHost])
def test_the_trainers_default_keeps_the_frames_and_nothing_else(host, tmp_path):
    policy, lara = build(host)
    rows = Rows(8)
    rows.batch |= {"lara_frames_valid": torch.arange(8) % 2 == 0, "note": torch.zeros(8)}
    trainer = trainer_of(policy, tmp_path, collate_flat, remove_unused_columns=True, per_device_train_batch_size=8)
    trainer.train_dataset = rows
    LaraCallback.add_to(trainer, lara)
    trainer.train()
    assert lara.step == 4
    assert lara.metrics()["valid_fraction"] == 0.5
    assert not getattr(policy, "seen", None)  # neither the frames nor the note


def test_without_the_callback_the_missing_frames_name_the_trainers_setting(tmp_path):
    policy, _ = build(KeywordHost)
    trainer = trainer_of(policy, tmp_path, collate_flat, remove_unused_columns=True)
    with pytest.raises(FrameError, match=r"'lara_frames'.*LaraCallback.add_to.*remove_unused_columns=False"):
        trainer.train()


def test_eval_loss_equals_that_of_the_baseline(tmp_path):
    policy, lara = build()
    plain = Host().train()
    plain.load_state_dict({k: v for k, v in policy.state_dict().items() if not k.startswith("lara.")})
    settings = {"label_names": ["inputs"], "prediction_loss_only": True}
    expected = trainer_of(plain, tmp_path, **settings).evaluate()["eval_loss"]
    trainer = trainer_of(policy, tmp_path, **settings)
    LaraCallback.add_to(trainer, lara)
    assert trainer.evaluate()["eval_loss"] == expected


class AcceptsAnything(FixedDit):
    """A host with **kwargs: Trainer then leaves the division by the accumulation steps to it (P11)."""

    def forward(self, inputs, **kwargs):
        return super().forward(inputs)


@pytest.mark.parametrize("host", [Host, AcceptsAnything])
def test_gradient_accumulation_scales_lara_like_the_main_loss(host, tmp_path):
    """Gradients of k accumulated batches over one batch: the same ratio for LARA's parameters as for the policy's."""
    ratios = []
    for name in ("lara.projector.2.weight", "action_out.weight"):
        norms = []
        for steps in (1, 4):
            policy, _ = build(host)
            grabbed = {}

            class Grab(transformers.TrainerCallback):
                def on_pre_optimizer_step(self, *args, model=None, policy=policy, grabbed=grabbed, **kwargs):
                    grabbed.update({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})

            trainer = trainer_of(
                policy, tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=steps,
                max_grad_norm=0.0,
            )  # fmt: skip
            # the same batch again and again: accumulation must change nothing but the scale
            trainer.train_dataset = torch.utils.data.Subset(Rows(), list(range(8)) * 4)
            sampler = torch.utils.data.SequentialSampler(trainer.train_dataset)
            trainer._get_train_sampler = lambda *a, sampler=sampler: sampler
            trainer.add_callback(Grab())
            trainer.train()
            norms.append(grabbed[name].norm().item())
        ratios.append(norms[1] / norms[0])
    assert ratios[0] == pytest.approx(ratios[1], rel=0.05)
    if host is Host:
        assert ratios[0] == pytest.approx(1.0, rel=0.05)


def state_of(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def test_resumed_at_step_k_is_bit_identical_to_no_interruption(tmp_path):
    """Projector, LAM, codebook statistics, schedules, optimizer and random state."""
    arguments = {"weight": Warmup(0.3, 5), "alignment": "contrastive"}
    policy, lara = build(**arguments)
    whole = trainer_of(policy, tmp_path / "whole", max_steps=6)
    LaraCallback.add_to(whole, lara)
    whole.train()

    policy, lara = build(**arguments)
    first = trainer_of(policy, tmp_path / "cut", max_steps=6, save_strategy="steps", save_steps=3)
    LaraCallback.add_to(first, lara)

    class Stop(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True
            return control

    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == 3
    policy, lara = build(**arguments)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)  # whatever it was: the checkpoint decides
    second = trainer_of(policy, tmp_path / "cut", max_steps=6)
    LaraCallback.add_to(second, lara)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    expected, found = state_of(whole), state_of(second)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_each_save_holds_the_adapter(tmp_path):
    from lara_adapter import load_lara

    policy, lara = build()
    trainer = trainer_of(policy, tmp_path, save_strategy="steps", save_steps=2)
    LaraCallback.add_to(trainer, lara)
    trainer.train()
    for step in (2, 4):
        again = load_lara(Host(), tmp_path / f"checkpoint-{step}" / "lara")
        assert again.step == step
    assert all(torch.equal(v, lara.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_run_that_is_resumed_with_other_frames_says_so(tmp_path, caplog):
    for steps, gap, said in ((2, 8, False), (4, 8, False), (6, 4, True)):
        policy, lara = build()
        trainer = trainer_of(policy, tmp_path, save_strategy="steps", save_steps=2, max_steps=steps)
        LaraCallback.add_to(trainer, lara, {"views": ("top",), "gap": gap})
        trainer.train(resume_from_checkpoint=steps > 2)
        assert ("saved with other frames than those of this run, in brackets: gap=8 (4)" in caplog.text) == said


def test_resuming_a_plain_run_with_lara_says_what_is_wrong(tmp_path, caplog):
    plain = trainer_of(Host().train(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    plain.train()
    policy, lara = build()
    trainer = trainer_of(policy, tmp_path, max_steps=4)
    LaraCallback.add_to(trainer, lara)
    with caplog.at_level(logging.WARNING), pytest.raises((ValueError, AttachOrderError)):
        trainer.train(resume_from_checkpoint=True)
    assert "has no LARA weights" in caplog.text
    assert "optimizer state does not fit" in caplog.text


def test_resuming_a_lara_run_without_lara_fails_in_the_optimizer_and_never_silently(tmp_path):
    policy, lara = build()
    trainer = trainer_of(policy, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    LaraCallback.add_to(trainer, lara)
    trainer.train()
    plain = trainer_of(Host().train(), tmp_path, max_steps=4)
    with pytest.raises(ValueError, match="parameter group"):
        plain.train(resume_from_checkpoint=True)


def test_the_callback_refuses_a_foreign_model(tmp_path):
    _, lara = build()
    other, _ = build()
    with pytest.raises(AttachOrderError, match=r"lara is not in trainer\.model"):
        LaraCallback.add_to(trainer_of(other, tmp_path), lara)


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16(bf16, tmp_path):
    policy, lara = build()
    trainer = trainer_of(policy, tmp_path, bf16=bf16)
    trainer.train()
    assert lara.projector[0].weight.dtype == torch.float32
    assert lara.metrics()["align_loss"] > 0


def with_lora(policy):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(policy, peft.LoraConfig(r=2, target_modules=["mlp.0", "mlp.2"]))


def lora_run(folder, steps):
    torch.manual_seed(0)
    policy = with_lora(Host().train())
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=1))
    lara = attach_lara(policy, lam, align_weight=0.3, lam_weight=0.2)
    trainer = trainer_of(policy, folder, save_strategy="steps", save_steps=2, max_steps=steps)
    LaraCallback.add_to(trainer, lara)
    return trainer, lara


def test_a_peft_run_resumes_with_projector_and_lam(tmp_path):
    """Of a PeftModel the Trainer saves the LoRA weights alone; LARA's come back from its folder in the checkpoint."""
    whole, lara = lora_run(tmp_path, 4)
    whole.train()
    resumed, again = lora_run(tmp_path, 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    after = whole.model.state_dict()
    assert any("lora_B" in name and bool(tensor.any()) for name, tensor in after.items())
    assert all(torch.equal(tensor, after[name]) for name, tensor in resumed.model.state_dict().items())
    assert again.step == lara.step == 4


@pytest.mark.parametrize("rate", [None, 1e-4])
def test_the_lam_can_have_a_learning_rate_of_its_own(rate, tmp_path):
    policy, lara = build()

    class WithLara(LaraTrainerMixin, Trainer):
        lam_lr = rate

    arguments = trainer_of(policy, tmp_path).args
    trainer = WithLara(policy, arguments, train_dataset=Rows(), data_collator=collate)
    trainer.train()
    of_lam = {id(p) for p in lara.lam.parameters()}
    rates = {
        (id(p) in of_lam, round(group["initial_lr"], 8))
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert rates == {(False, 1e-2), (True, rate or 1e-2)}
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == sum(p.requires_grad for p in policy.parameters())
