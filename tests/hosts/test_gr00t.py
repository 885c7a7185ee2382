"""On real GR00T N1.6 code: its action head, processor, collator, dataset, trainer, experiment.run and Gr00tPolicy.

The vision-language backbone alone is a stand-in (it needs flash-attn); see examples/gr00t_tiny.py.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip(
    "gr00t",
    reason="GR00T N1.6 is on no registry: set LARA_GR00T_SRC to a checkout, or install it",
    exc_type=ImportError,
)

from gr00t.configs.data.embodiment_configs import MODALITY_CONFIGS
from gr00t.data.dataset import sharded_mixture_dataset
from gr00t.data.embodiment_tags import EmbodimentTag
from gr00t.data.stats import generate_stats
from lara_adapter.integrations.gr00t import (
    LaraCallback,
    LaraSettings,
    LoraSettings,
    add_frames,
    export_policy,
    run,
    wrap_in_lora,
)
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, TrainingArguments

from examples import gr00t_tiny
from lara_adapter import AttachOrderError, FrameError, LaraArgumentError, LatentActionModel, attach_lara

TAG, OTHER = "new_embodiment", "oxe_widowx"  # 16 steps, and 8 steps; both padded to the model's 50
HORIZONS = {TAG: 16, OTHER: 8}
LENGTHS = (40, 30)


class OneThread:
    """An executor without a thread.

    GR00T prepares the next shard in a thread that draws from the global random numbers while the model trains, so that
    even two stock runs differ now and then.
    """

    def __init__(self, max_workers):
        pass

    def submit(self, function, *args, **kwargs):
        job = Future()
        job.set_result(function(*args, **kwargs))
        return job

    def shutdown(self, wait=True):
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders: demonstrations and their modality, a base model, a LAM."""
    root = tmp_path_factory.mktemp("gr00t")
    kept = dict(MODALITY_CONFIGS)
    for tag, horizon in HORIZONS.items():
        gr00t_tiny.import_file(gr00t_tiny.write_modality_config(root / f"{tag}.py", tag, horizon))
    gr00t_tiny.write_demonstrations(root / "demonstrations", lengths=LENGTHS)
    generate_stats(root / "demonstrations")
    for tag in HORIZONS:
        gr00t_tiny.write_base_model(root / f"base-{tag}", tag)
    gr00t_tiny.write_lam(root / "lam")
    with gr00t_tiny.tiny_backbone(), mock.patch.object(sharded_mixture_dataset, "ThreadPoolExecutor", OneThread):
        yield root
    MODALITY_CONFIGS.clear()
    MODALITY_CONFIGS.update(kept)


def build_model(world, tag=TAG, **changes):
    torch.manual_seed(0)
    return AutoModel.from_pretrained(world / f"base-{tag}", **changes).train()


@functools.cache
def load_processor(folder):
    return AutoProcessor.from_pretrained(folder)  # takes seconds


def build_dataset(world, tag=TAG, training=True, **frames):
    """GR00T's own dataset of the demonstrations, with LARA's frames unless frames=None."""
    from gr00t.data.dataset.sharded_single_step_dataset import ShardedSingleStepDataset

    dataset = ShardedSingleStepDataset(
        world / "demonstrations", EmbodimentTag(tag), MODALITY_CONFIGS[tag], video_backend="opencv", shard_size=1000,
        episode_sampling_rate=1.0,
    )  # fmt: skip
    processor = load_processor(world / f"base-{tag}")
    processor.train() if training else processor.eval()
    dataset.set_processor(processor)
    if frames.pop("frames", True):
        add_frames(dataset, **{"frame_size": 32, **frames})
    return dataset


def build_lam(world):
    return LatentActionModel.from_pretrained(world / "lam")


def collate(dataset, samples):
    return dataset.processor.collator(samples)


def samples_of(dataset, steps=(0, 3, 8, 12), episode=0):
    table = dataset.episode_loader[episode]
    return [dataset.get_datapoint(table, step) for step in steps]


def settings_of(world, **changes):
    return LaraSettings(lam=str(world / "lam"), **{"align_weight": 0.3, "lam_weight": 0.2, **changes})


def trainer_of(model, dataset, folder, collator=None, **changes):
    from gr00t.experiment.trainer import Gr00tTrainer

    class Steps(torch.utils.data.IterableDataset):
        seed = 0

        def __iter__(self):
            yield from samples_of(dataset, range(16))

        def reset_seed(self, seed):
            self.seed = seed

    settings = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "remove_unused_columns": False, "use_cpu": True,
        "disable_tqdm": True, "max_grad_norm": 0.0, **changes,
    }  # fmt: skip
    return Gr00tTrainer(
        model=model, args=TrainingArguments(**settings), train_dataset=Steps(),
        data_collator=collator or dataset.processor.collator,
    )  # fmt: skip


# ---------------------------------------------------------------------- frames


def test_the_pair_is_t_and_t_plus_c_and_ends_with_the_episode(world):
    dataset = build_dataset(world, gap=20)
    table = dataset.episode_loader[0]
    front = [np.asarray(frame)[..., ::-1] for frame in table["video.front"]]  # opencv's BGR
    for step, future, valid in ((0, 20, True), (19, 39, True), (20, 39, False), (24, 39, False)):
        sample = dataset.get_datapoint(table, step)
        small = [F.interpolate(torch.tensor(front[i].copy()).permute(2, 0, 1)[None], (32, 32), mode="bilinear",
                               antialias=True)[0].numpy() for i in (step, future)]  # fmt: skip
        assert sample["lara_frames"].dtype == np.uint8
        assert np.array_equal(sample["lara_frames"], np.stack(small))
        assert bool(sample["lara_frames_valid"]) is valid


def test_the_square_is_red_for_the_lam(world):
    """GR00T's opencv backend decodes to BGR."""
    frames = samples_of(build_dataset(world), (0,))[0]["lara_frames"].reshape(2, 3, -1).max(-1)
    assert (frames[:, 0] > 150).all()
    assert (frames[:, 2] < 120).all()


def test_the_horizon_is_the_chunk_and_the_only_invalid_pair_is_the_last(world):
    for tag, horizon in HORIZONS.items():
        dataset = build_dataset(world, tag)
        flags = [bool(s["lara_frames_valid"]) for s in samples_of(dataset, range(LENGTHS[0] - horizon + 1))]
        assert flags == [True] * (LENGTHS[0] - horizon) + [False]


def test_several_views_and_the_mistakes(world):
    both = samples_of(build_dataset(world, views=["wrist", "front"]), (5,))[0]["lara_frames"]
    assert both.shape == (2, 2, 3, 32, 32)
    assert np.array_equal(both[1], samples_of(build_dataset(world), (5,))[0]["lara_frames"])
    with pytest.raises(FrameError, match=r"\['top'\] are not loaded.*\['front', 'wrist'\]"):
        build_dataset(world, views=["top"])
    with pytest.raises(FrameError, match="already"):
        add_frames(build_dataset(world))
    with pytest.raises(LaraArgumentError, match=r"gap=40 steps, but the longest episode of .*demonstrations has 40"):
        build_dataset(world, gap=40)
    assert bool(samples_of(build_dataset(world, gap=39), (0,))[0]["lara_frames_valid"])


def test_the_dataset_still_pickles(world):
    dataset = pickle.loads(pickle.dumps(build_dataset(world)))
    assert "lara_frames" in samples_of(dataset, (1,))[0]


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_sees_what_stock_gr00t_sees(world, training, monkeypatch):
    """Every other entry of the samples, and what enters the backbone and the head, are bit-identical."""
    seen = []
    for frames in (False, True):
        dataset = build_dataset(world, training=training, frames=frames)
        torch.manual_seed(1)
        np.random.seed(1)
        __import__("random").seed(1)
        samples = samples_of(dataset, range(6))
        batch = collate(dataset, samples)
        model = build_model(world)
        if frames:
            attach_lara(model, build_lam(world))
        inputs = {}
        monkeypatch.setattr(
            model.backbone,
            "prepare_input",
            lambda b, i=inputs, m=model: i.update(b) or type(m.backbone).prepare_input(m, b),
        )
        model(**batch)
        seen.append(inputs)
    stock, ours = seen
    assert stock.keys() == ours.keys()
    assert not any("lara" in name for name in ours)
    for name, value in stock.items():
        pairs = zip(value, ours[name], strict=True) if isinstance(value, list) else [(value, ours[name])]
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs), name


# ---------------------------------------------------------------------- terms and gradients


def reference(model, lara, batch, last):
    """L_ACT + w1 L_LARA + w2 L_LAM written out, on the list of hidden states that GR00T's DiT itself returns."""
    states = {}
    dit = model.action_head.model
    original = dit.forward

    def recording(*args, **kwargs):
        out, states["all"] = original(*args, **kwargs)
        return out, states["all"]

    dit.forward = recording
    with lara.disabled():
        loss = model(**batch)["loss"]
    del dit.forward
    inputs = batch["inputs"]
    hidden = states["all"][lara.config.layer]  # [embeddings, after block 1, ...]
    vectors = hidden[torch.arange(len(hidden)), 1 + torch.tensor(last)]
    present, future = inputs["lara_frames"].unbind(1)
    valid = inputs["lara_frames_valid"]
    output = lara.lam(present, future, valid=valid)
    target = output.latent.continuous.flatten(1)
    rows = 1 - F.cosine_similarity(lara.projector(vectors), target, dim=-1)
    align = rows[valid].mean()
    return {"action": loss, "align": align, "lam": output.loss, "total": loss + 0.3 * align + 0.2 * output.loss}


@pytest.mark.parametrize("layer", [-1, -3, 1])
def test_every_term_and_every_gradient(world, layer):
    dataset = build_dataset(world)
    batch = collate(dataset, samples_of(dataset, (0, 3, 12, 24)))  # the last pair ends past the episode
    assert batch["inputs"]["lara_frames_valid"].tolist() == [True, True, True, False]
    model = build_model(world)
    lara = attach_lara(model, build_lam(world), layer, align_weight=0.3, lam_weight=0.2)
    twin = copy.deepcopy(model)

    torch.manual_seed(7)
    ours = model(**batch)["loss"]
    ours.backward()
    torch.manual_seed(7)
    wanted = reference(twin, twin.lara, batch, [15] * 4)
    wanted["total"].backward()

    torch.testing.assert_close(ours, wanted["total"])
    torch.testing.assert_close(lara.losses.align, wanted["align"])
    torch.testing.assert_close(lara.losses.lam, wanted["lam"])
    compared = 0
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )
            compared += 1
    assert compared > 150
    report = lara.check(batch, torch.optim.AdamW(model.parameters()))
    assert report.ok, str(report)
    assert report.blocks_reached == report.blocks_below == lara.config.layer


def test_the_last_valid_step_of_each_embodiment(world):
    """A batch of a 16-step and an 8-step embodiment, both padded to 50: tokens 15 and 7, not 49."""
    datasets = {tag: build_dataset(world, tag, gap=8) for tag in HORIZONS}
    samples = [samples_of(datasets[tag], (step,))[0] for tag in HORIZONS for step in (2, 9)]
    batch = collate(datasets[TAG], samples)
    assert batch["inputs"]["action"].shape[1] == 50
    assert batch["inputs"]["embodiment_id"].unique().numel() == 2
    model = build_model(world)
    lara = attach_lara(model, build_lam(world), align_weight=0.3, lam_weight=0.2)
    twin = copy.deepcopy(model)
    torch.manual_seed(7)
    model(**batch)["loss"].backward()
    torch.manual_seed(7)
    right = reference(twin, twin.lara, batch, [15, 15, 7, 7])["align"]
    torch.manual_seed(7)
    padding = reference(twin, twin.lara, batch, [49] * 4)["align"]
    torch.testing.assert_close(lara.losses.align, right)
    assert abs(float(lara.losses.align - padding)) > 1e-3


def test_two_trainer_steps(world, tmp_path):
    dataset, model = build_dataset(world), build_model(world)
    lara = attach_lara(model, build_lam(world), align_weight=0.3, lam_weight=0.2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, dataset, tmp_path)
    LaraCallback.add_to(trainer, lara)
    trainer.train()
    still = [name for name, p in model.named_parameters() if p.grad is not None and torch.equal(before[name], p)]
    assert not still
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all(
        {"lara/align_loss", "lara/lam_loss", "lara/cosine", "lara/codes_used"} <= entry.keys() for entry in logged
    )
    assert lara.step == 2
    assert not trainer.model_accepts_loss_kwargs


def test_two_trainer_steps_equal_the_same_steps_by_hand(world, tmp_path):
    """In each of two steps of GR00T's trainer: every term, every gradient, and the weights that come of them."""
    dataset, model = build_dataset(world), build_model(world)
    lara = attach_lara(model, build_lam(world), align_weight=0.3, lam_weight=0.2)
    twin = copy.deepcopy(model)
    batches, steps = [], []

    def collate_and_keep(samples):
        batches.append(collate(dataset, samples))
        return copy.deepcopy(batches[-1])

    class Look(LaraCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found = {"total": trainer.loss, "align": self.lara.losses.align, "lam": self.lara.losses.lam}
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            steps.append(({name: value.detach().clone() for name, value in found.items()}, gradients))

    model.register_forward_pre_hook(lambda module, args: (torch.manual_seed(7), None)[1])
    settings = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.05}
    trainer = trainer_of(model, dataset, tmp_path, collate_and_keep, **settings)
    trainer.add_callback(Look(lara))
    trainer.train()

    assert len(steps) == 2
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for batch, (terms, gradients) in zip(batches, steps, strict=False):
        optimizer.zero_grad()
        torch.manual_seed(7)
        wanted = reference(twin, twin.lara, batch, [15] * 4)
        wanted["total"].backward()
        for name, value in terms.items():
            torch.testing.assert_close(value, wanted[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
        by_hand = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        assert gradients.keys() == by_hand.keys()
        assert len(gradients) > 150
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, by_hand[name], rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        optimizer.step()
    assert not torch.equal(steps[0][1]["lara.projector.0.weight"], steps[1][1]["lara.projector.0.weight"])
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_accumulation_divides_lara_like_the_action_loss(world, tmp_path):
    """Two equal micro-batches accumulate to the gradient of one."""
    dataset = build_dataset(world)
    fixed = collate(dataset, samples_of(dataset))
    gradients = []
    for steps in (1, 2):
        model = build_model(world)
        lara = attach_lara(model, build_lam(world), align_weight=0.3, lam_weight=0.2)

        def same_noise(module, args):
            torch.manual_seed(3)

        model.register_forward_pre_hook(same_noise)

        class Keep(LaraCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                gradients.append(
                    {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None}
                )

        trainer = trainer_of(
            model, dataset, tmp_path, lambda samples: fixed, gradient_accumulation_steps=steps, max_steps=1
        )
        trainer.add_callback(Keep(lara))
        trainer.train()
    one, two = gradients
    assert any(name.startswith("lara.projector") for name in one)
    for name, gradient in one.items():
        if "quantizer" not in name:  # its codebook's statistics see each micro-batch
            torch.testing.assert_close(
                two[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}"
            )


def test_bf16(world, tmp_path):
    dataset, model = build_dataset(world), build_model(world)
    lara = attach_lara(model, build_lam(world), align_weight=0.3, lam_weight=0.2)
    trainer = trainer_of(model, dataset, tmp_path, bf16=True)
    LaraCallback.add_to(trainer, lara)
    trainer.train()
    assert all(np.isfinite(value) for value in lara.metrics().values())
    assert lara.losses.total.dtype == torch.float32
    assert {p.dtype for p in lara.parameters()} == {torch.float32}


def test_lora_trains_the_adapters_the_projectors_and_lara(world):
    dataset = build_dataset(world)
    batch = collate(dataset, samples_of(dataset))
    model = wrap_in_lora(build_model(world), LoraSettings(rank=2))
    lara = attach_lara(model, build_lam(world), -1)
    model.train()
    for module in model.modules():  # B starts at zero, and its A then has no gradient
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.02)
    model(**batch)["loss"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert sum("lora_A" in name for name in moved) == 6 * 6  # blocks x matrices
    assert any("state_encoder.modules_to_save" in name for name in moved)
    assert any(".lara.projector." in name for name in moved)
    assert not any("base_layer" in name or "backbone" in name for name in moved)
    assert lara.metrics()["valid_fraction"] == 1


# ---------------------------------------------------------------------- whole runs


def gr00t_config(world, folder, steps=4, save=2):
    from gr00t.configs.base_config import get_default_config

    dataset = {"dataset_paths": [str(world / "demonstrations")], "mix_ratio": 1.0, "embodiment_tag": TAG}
    config = get_default_config().load_dict({"data": {"download_cache": False, "datasets": [dataset]}})
    config.data.modality_configs = {TAG: MODALITY_CONFIGS[TAG]}
    config.data.video_backend, config.data.shard_size, config.data.num_shards_per_epoch = "opencv", 16, 20
    config.model.load_bf16, config.model.eagle_collator = True, True
    training = config.training
    training.start_from_checkpoint, training.output_dir = str(world / f"base-{TAG}"), str(folder)
    training.global_batch_size, training.dataloader_num_workers, training.max_steps = 4, 0, steps
    training.save_steps, training.logging_steps, training.optim = save, 1, "adamw_torch"
    training.bf16 = training.tf32 = False
    training.learning_rate = 1e-3
    return config


def weights(folder, ours=False):
    tensors = load_file(Path(folder) / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("lara.") is ours}


def test_weights_of_zero_train_bit_identically_to_stock_gr00t(world, tmp_path):
    from gr00t.experiment import experiment

    experiment.run(gr00t_config(world, tmp_path / "stock", 3, 3))
    run(gr00t_config(world, tmp_path / "ours", 3, 3), settings_of(world, align_weight=0.0, lam_weight=0.0))
    stock, ours = weights(tmp_path / "stock/checkpoint-3"), weights(tmp_path / "ours/checkpoint-3")
    base = weights(world / f"base-{TAG}")
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    assert not all(torch.equal(stock[name], base[name]) for name in stock)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run of 4 steps with a checkpoint at each second."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(gr00t_config(world, folder), settings_of(world, lam_lr=1e-4))


def test_the_registry_and_the_trainer_are_put_back(finished):
    from gr00t.experiment import experiment

    assert experiment.Gr00tTrainer.__name__ == "Gr00tTrainer"
    assert [pipeline.__name__ for pipeline in experiment.MODEL_REGISTRY.values()] == ["Gr00tN1d6Pipeline"]


def test_the_lam_has_its_own_learning_rate(finished):
    state = torch.load(finished[0] / "checkpoint-4/optimizer.pt", weights_only=True)
    rates = {round(group["initial_lr"], 6) for group in state["param_groups"]}
    assert rates == {1e-3, 1e-4}


def test_a_run_resumes_with_projector_lam_and_optimizer(world, finished, tmp_path, caplog):
    """The resumed run starts from the checkpoint's weights: with a learning rate of 0 it ends with them. And it is told
    that its frames are other ones."""
    import shutil

    shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    config = gr00t_config(world, tmp_path, 4)
    seen = {}

    class Look(LaraCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.update(
                step=state.global_step, lara_step=self.lara.step,
                weights={n: p.detach().clone() for n, p in kwargs["model"].named_parameters()},
                moments=len(kwargs["optimizer"].state),
            )  # fmt: skip

    module = sys.modules["lara_adapter.integrations.gr00t.train"]
    original, module.LaraCallback = module.LaraCallback, Look
    try:
        lara = run(config, settings_of(world, lam_lr=1e-4, gap=3))
    finally:
        module.LaraCallback = original
    assert "checkpoint-2/lara was saved with other frames than those of this run, in brackets: gap=" in caplog.text
    assert (seen["step"], seen["lara_step"], lara.step) == (2, 2, 4)
    assert seen["moments"] > 150
    saved = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in seen["weights"].items())


def test_resuming_a_stock_run_is_refused_before_anything_loads(world, tmp_path):
    from gr00t.experiment import experiment

    experiment.run(gr00t_config(world, tmp_path, 1, 1))
    with pytest.raises(AttachOrderError, match=r"without LARA.*another output folder"):
        run(gr00t_config(world, tmp_path, 2, 1), settings_of(world))


ACT = """
import sys
sys.modules["lara_adapter"] = None  # any import of it fails
sys.path.insert(0, sys.argv[1])
import numpy as np, torch, warnings
from gr00t.data.embodiment_tags import EmbodimentTag
from gr00t.policy.gr00t_policy import Gr00tPolicy
from gr00t.model.gr00t_n1d6 import gr00t_n1d6
from tiny_backbone_only import TinyBackbone
gr00t_n1d6.get_backbone_cls = lambda config: lambda **kw: TinyBackbone(config.backbone_embedding_dim)
policy = Gr00tPolicy(embodiment_tag=EmbodimentTag("new_embodiment"), model_path=sys.argv[2], device="cpu")
torch.manual_seed(0)
look = {
    "video": {name: np.full((1, 1, 64, 64, 3), 60, np.uint8) for name in ("front", "wrist")},
    "state": {"position": np.zeros((1, 1, 2), np.float32)},
    "language": {"annotation.human.task_description": [["move the square"]]},
}
np.save(sys.argv[3], policy.get_action(look)[0]["velocity"])
"""


def act_without_lara(policy_folder, tmp_path):
    """Gr00tPolicy in a process in which lara_adapter cannot be imported; the same command for any folder."""
    source = Path(gr00t_tiny.__file__).read_text()
    source = source.replace("from lara_adapter import LatentActionConfig, LatentActionModel\n", "")
    (tmp_path / "tiny_backbone_only.py").write_text(source)
    out = tmp_path / "action.npy"
    command = [sys.executable, "-c", ACT, str(tmp_path), str(policy_folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out), done.stdout + done.stderr


def test_the_exported_policy_acts_in_stock_gr00t_without_lara_adapter(finished, tmp_path):
    folder, _ = finished
    target = export_policy(folder / "checkpoint-4", tmp_path / "policy")
    assert not weights(target, ours=True)
    trained = weights(folder / "checkpoint-4")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(target).items())
    assert weights(target).keys() == trained.keys()
    assert not (target / "lara").exists()
    assert not (target / "optimizer.pt").exists()
    action, said = act_without_lara(target, tmp_path)
    assert action.shape == (1, 16, 2)
    assert np.isfinite(action).all()
    assert "lara" not in said.replace(str(tmp_path), "").lower()
    # the output folder holds the last step's model too, and its processor in a folder of its own
    whole = export_policy(folder, tmp_path / "whole")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(whole).items())
    assert AutoProcessor.from_pretrained(whole).get_modality_configs().keys() == {TAG}
    assert not list(whole.glob("checkpoint-*"))
    unstripped, said = act_without_lara(folder / "checkpoint-4", tmp_path)
    assert np.array_equal(action, unstripped)  # LARA's tensors are ignored, with transformers' warning
    assert "lara.projector" in said


def test_a_lora_run_resumes_and_its_export_is_the_merged_policy(world, tmp_path):
    lora = LoraSettings(rank=2)
    lara = run(gr00t_config(world, tmp_path / "run", 2, 2), settings_of(world), lora)
    projector = {name: p.detach().clone() for name, p in lara.named_parameters()}
    checkpoint = tmp_path / "run/checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 0.8 * (
        world / f"base-{TAG}/model.safetensors"
    ).stat().st_size
    seen = {}
    module = sys.modules["lara_adapter.integrations.gr00t.train"]

    class Look(LaraCallback):
        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            seen.update({name: p.detach().clone() for name, p in self.lara.named_parameters()}, step=self.lara.step)

    original, module.LaraCallback = module.LaraCallback, Look
    try:
        again = run(gr00t_config(world, tmp_path / "run", 3, 3), settings_of(world), lora)
    finally:
        module.LaraCallback = original
    assert seen.pop("step") == 2
    assert all(torch.equal(seen[name], value) for name, value in projector.items())
    assert again.step == 3
    target = export_policy(tmp_path / "run/checkpoint-3", tmp_path / "policy")
    assert weights(target).keys() == weights(world / f"base-{TAG}").keys()
    trained = again.binding.peft.merge_and_unload()
    again.detach()
    merged = weights(target)
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    action, _ = act_without_lara(target, tmp_path)
    assert np.isfinite(action).all()
