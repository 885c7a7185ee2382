"""`lara train-lam`: real videos, real processes; what is resumed ends with the same bits."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("accelerate")
pytest.importorskip("tqdm")

from helpers.interrupted import interrupted
from helpers.videos import square, write_v30, write_video

from lara_adapter import LaraArgumentError, LatentActionConfig, LatentActionModel, NonFiniteError, cli
from lara_adapter.data.decode import decode_all
from lara_adapter.lam.pretrain import PretrainSettings, pretrain_lam
from lara_adapter.lam.pretrain.run import rate_at
from lara_adapter.storage.files import read_tensors

ROOT = Path(__file__).parents[2]
SMALL = {
    "image_size": 16, "encoder_width": 16, "idm_width": 16, "idm_mlp": 16, "fdm_width": 16, "fdm_mlp": 16, "fdm_layers": 1,
    "queries": 2, "latent_dim": 8, "codebook_size": 16, "vq_revive_every": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(8):
        write_video(folder / f"{number}.mp4", square(80, number))
    return folder


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


def settings_of(videos, output, config=None, **changes):
    given = {
        "preset": "tiny", "config": config, "steps": 12, "batch_size": 8, "workers": 1, "save_every": 4, "health_every": 6,
        "health_pairs": 16, "shuffle_frames": 120, "log_every": 4,
    }  # fmt: skip
    return PretrainSettings(videos=(videos,), output=output, **{**given, **changes})


def same(one, other):
    first, second = (read_tensors(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def command(videos, output, config, *more):
    arguments = [
        "-m", "lara_adapter.cli", "train-lam", str(videos), "--output", str(output), "--preset", "tiny", "--config",
        str(config), "--batch-size", "8", "--workers", "1", "--health-pairs", "16", "--shuffle-frames", "120", *more,
    ]  # fmt: skip
    return [sys.executable, *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


# ---------------------------------------------------------------------- what comes out


def test_it_learns_to_beat_the_copy_through_the_latent(videos, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"image_size": 32, "vq_warmup_steps": 80}))
    settings = settings_of(videos, tmp_path / "run", config, steps=160, batch_size=32, lr=1e-3, save_every=160,
                           health_every=80, health_pairs=64, shuffle_frames=4096)  # fmt: skip
    result = pretrain_lam(settings)
    assert result.steps == 160
    assert result.pairs_per_second > 0
    assert result.health.pairs == 64
    assert result.health.ratio < 0.8
    assert result.health.codes_used > 20
    model = LatentActionModel.from_pretrained(result.output)
    assert model.config == dataclasses.replace(settings.model_config(), gap="5")  # which says what it learnt with
    lines = [json.loads(line) for line in (result.output / "health.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [80, 160]
    assert lines[-1]["ratio"] == pytest.approx(result.health.ratio)
    report = json.loads((result.output / "videos.json").read_text())
    assert report["usable"] == 8
    assert report["indexed_frames_per_second"] > 0
    again = pretrain_lam(settings)  # nothing is left to do: it is measured, and noted once
    assert again.health == result.health
    assert [json.loads(line) for line in (result.output / "health.jsonl").read_text().splitlines()] == lines
    # the latent matters: another pair's is worse
    from lara_adapter.data import IndexSettings, build_index, find_sources
    from lara_adapter.data.pairs import read_pairs

    clips = build_index(find_sources([videos]), IndexSettings(), tmp_path / "run" / "index").sources
    ((present, future),) = read_pairs(clips, 32, 64, 64)
    latent = model.encode(present, future).quantized
    error = [(model.predict(present, z) - future / 255).square().mean().item() for z in (latent, latent.roll(7, 0))]
    assert error[0] < 0.9 * error[1]


def test_pictures_show_present_future_and_prediction(videos, small, tmp_path):
    from lara_adapter.data import Source

    pretrain_lam(settings_of(videos, tmp_path / "run", small))
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert pictures == ["step-00000006.png", "step-00000012.png"]
    folder = tmp_path / "run" / "pictures"
    first = next(decode_all(Source(folder, "pictures"))).frame.to_ndarray(format="rgb24")
    assert first.shape == (8 * 18, 4 * 18, 3)
    assert (first[16:18] == 255).all()
    present, future = first[:16, :16].astype(float), first[:16, 18:34].astype(float)
    assert 0 < abs(present - future).mean() < 60


def test_settings_reach_the_model(tmp_path, small):
    paper = PretrainSettings(videos=(tmp_path,), output=tmp_path)
    assert paper.model_config() == LatentActionConfig.paper()
    assert (paper.filled().steps, paper.filled().lr, paper.filled().chain, paper.gap) == (350_000, 1e-4, 4, "5")
    tiny = dataclasses.replace(paper, preset="tiny", steps=400)
    assert tiny.model_config() == LatentActionConfig.tiny(vq_warmup_steps=100)
    assert dataclasses.replace(tiny, config=small).model_config().codebook_size == 16
    whole = tmp_path / "config.json"
    LatentActionConfig.tiny(queries=3).save(whole)
    assert dataclasses.replace(paper, config=whole).model_config() == LatentActionConfig.tiny(queries=3)
    whole.write_text('{"querys": 3}')
    with pytest.raises(LaraArgumentError, match=r"querys; did you mean queries\?"):
        dataclasses.replace(paper, config=whole).model_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"), ({"lr": math.nan}, "lr=nan"), ({"ema": 1.0}, "ema=1.0"), ({"gap": "0s"}, "gap='0s'"),
        ({"gap_seconds": 0.0}, "gap='0.0s'"),
        ({"reconstruct": 0.0}, "reconstruct=0.0"),
        ({"gap_frames": 5, "gap_seconds": 1.0}, "only one"), ({"videos": ()}, "at least one folder"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(tmp_path, changes, message):
    with pytest.raises(LaraArgumentError, match=message):
        PretrainSettings(**{"videos": (tmp_path,), "output": tmp_path, **changes})


def test_the_old_names_of_the_gap_still_work_in_code_and_in_saved_runs(videos, small, tmp_path, caplog):
    settings = settings_of(videos, tmp_path / "run", small, gap=3, steps=2, save_every=2)
    assert settings.gap == "3"
    assert settings_of(videos, tmp_path, gap_frames=3).gap == "3"
    assert settings_of(videos, tmp_path, gap_seconds=0.5).gap == "0.5s"
    assert [record.getMessage() for record in caplog.records] == [
        f"gap_frames and gap_seconds are deprecated and go with the next release; use gap={gap!r}"
        for gap in ("3", "0.5s")
    ]
    pretrain_lam(settings)
    path = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    assert state["settings"].pop("gap") == "3"
    state["settings"] |= {"gap_frames": 3, "gap_seconds": None}  # as an earlier release wrote them
    path.write_text(json.dumps(state))
    assert pretrain_lam(settings).steps == 2
    with pytest.raises(LaraArgumentError, match=r"gap was '3' and is '4'"):
        pretrain_lam(dataclasses.replace(settings, gap="4"))


def test_the_learning_rate_rises_and_falls():
    rates = [rate_at(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.002
    assert rate_at(0, 10, 1.0, 0.0) == 1.0


def test_training_continues_from_another_lam(videos, small, tmp_path):
    pretrain_lam(settings_of(videos, tmp_path / "first", small))
    settings = settings_of(videos, tmp_path / "second", init=str(tmp_path / "first"), steps=1, lr=1e-12)
    pretrain_lam(settings)
    first, second = (LatentActionModel.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert first.config == second.config
    for one, other in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("log_every", [2, 50])  # 50: no line of the log is due before the first checkpoint is
def test_a_loss_that_is_not_finite_raises_and_the_checkpoints_stay(videos, small, tmp_path, monkeypatch, log_every):
    pretrain_lam(settings_of(videos, tmp_path / "run", small, steps=20, save_every=20))
    real = torch.optim.AdamW.step

    def step(self, *a, **k):
        for group in self.param_groups:
            group["params"][0].data.fill_(math.inf)
        return real(self, *a, **k)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(NonFiniteError, match="checkpoints"):
        pretrain_lam(settings_of(videos, tmp_path / "other", small, log_every=log_every))
    assert not (tmp_path / "other" / "model.safetensors").exists()
    assert not list((tmp_path / "other").glob("checkpoints/*"))


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"accumulate": 2, "bf16": True, "reconstruct": 0.25}], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(videos, small, tmp_path, changes, caplog):
    whole = settings_of(videos, tmp_path / "whole", small, **changes)
    pretrain_lam(whole)
    broken = dataclasses.replace(whole, output=tmp_path / "broken")
    interrupted(broken, 6)
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["step-00000004"]
    torch.rand(3)  # another state of the generators
    with caplog.at_level(logging.INFO):
        pretrain_lam(broken)
    assert "resumed from" in caplog.text
    assert same(tmp_path / "whole", tmp_path / "broken")
    last = "checkpoints/step-00000012"
    assert same(tmp_path / "whole" / last, tmp_path / "broken" / last)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "health.jsonl").read_text().splitlines()]
    assert steps == [6, 12]  # the one measured before the interruption is measured again, and stands there once
    if "ema" in changes:
        raw = read_tensors(tmp_path / "whole" / last / "model.safetensors")
        mean = read_tensors(tmp_path / "whole" / "model.safetensors")
        assert not torch.equal(raw["forward_dynamics.head.bias"], mean["forward_dynamics.head.bias"])


def test_kill_9_in_the_middle(videos, small, tmp_path, caplog):
    pytest.importorskip("tyro")
    more = ["--steps", "60", "--save-every", "5", "--keep", "2", "--ema", "0.9", "--health-every", "30"]
    process = subprocess.Popen(
        command(videos, tmp_path / "killed", small, *more), env=ENVIRONMENT, stderr=subprocess.PIPE
    )
    deadline = time.time() + 120
    while not list((tmp_path / "killed").glob("checkpoints/step-0000001?")):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert left
    assert "step-00000060" not in left
    settings = settings_of(videos, tmp_path / "whole", small, steps=60, save_every=5, keep=2, ema=0.9, health_every=30)
    with caplog.at_level(logging.INFO):
        pretrain_lam(settings)
        assert "resumed from" not in caplog.text
        pretrain_lam(dataclasses.replace(settings, output=tmp_path / "killed"))
        assert "resumed from" in caplog.text
    assert same(tmp_path / "killed", tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert names == ["step-00000055", "step-00000060"]


def test_a_run_resumes_only_with_the_same_settings(videos, small, tmp_path, monkeypatch):
    settings = settings_of(videos, tmp_path / "run", small)
    pretrain_lam(settings)
    again = pretrain_lam(settings)
    assert (again.steps, again.pairs_per_second) == (12, 0.0)
    assert again.health is not None
    # before anything is indexed, which can take hours
    monkeypatch.setattr("lara_adapter.lam.pretrain.run.find_videos", lambda settings: pytest.fail("videos were read"))
    with pytest.raises(LaraArgumentError, match=r"lr was 0\.0005 and is 0\.1"):
        pretrain_lam(dataclasses.replace(settings, lr=0.1))
    with pytest.raises(LaraArgumentError, match=r"reconstruct was 1\.0 and is 0\.5"):
        pretrain_lam(dataclasses.replace(settings, reconstruct=0.5))
    with pytest.raises(LaraArgumentError, match="holds a run already"):
        pretrain_lam(dataclasses.replace(settings, resume="never"))


# ---------------------------------------------------------------------- processes

TWO = """
import json, os, sys
from pathlib import Path
from lara_adapter.lam.pretrain import run
seen = []
real = run.move
def move(batch, device):
    seen.extend((batch.epoch, *row) for row in batch.where.tolist())
    return real(batch, device)
run.move = move
from lara_adapter.lam.pretrain import PretrainSettings, pretrain_lam
settings = PretrainSettings(
    videos=(Path(sys.argv[1]),), output=Path(sys.argv[2]), preset="tiny", config=Path(sys.argv[3]), steps=int(sys.argv[4]),
    batch_size=4, workers=1, health_pairs=8, save_every=20, shuffle_frames=200)
pretrain_lam(settings)
Path(sys.argv[2], f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def test_two_processes_take_disjoint_pairs_and_together_all(tmp_path, small):
    pytest.importorskip("pyarrow")
    write_v30(tmp_path / "set", [80, 60, 70, 75], fps=30)
    (tmp_path / "two.py").write_text(TWO)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]

    def train(steps):
        arguments = [str(tmp_path / "set"), str(tmp_path / "run"), str(small), str(steps)]
        done = subprocess.run(
            [sys.executable, *run, *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((tmp_path / "run" / f"seen-{rank}.json").read_text()) for rank in range(2)]

    first, second = ({tuple(pair[1:]) for pair in share if pair[0] == 0} for share in train(40))
    assert not first & second
    report = json.loads((tmp_path / "run" / "videos.json").read_text())
    assert report["pairs"] > 100
    assert len(first | second) == report["pairs"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000040" / "state.json").read_text())
    assert state["processes"] == 2
    LatentActionModel.from_pretrained(tmp_path / "run")


# ---------------------------------------------------------------------- the command


def test_the_command_prints_the_result(videos, small, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro")
    arguments = command(videos, tmp_path / "run", small, "--steps", "4", "--gap", "0.2s")[3:]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'run'}: 4 steps, reconstruction / copy ")
    # what lara health would fail, after so few steps, follows
    names = {line.split(":")[0] for line in out.splitlines()[1:]}
    assert names <= {"reconstruction", "codes", "latent", "direction"}
    assert "INFO video: 8 sources, 8 usable, 640 frames" in err
    assert cli.main(["train-lam", "--help"]) == 0
    assert "for collections of different frame rates" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        (lambda f: None, [], "does not exist"),
        (lambda f: f.mkdir(), [], "no usable video among 0 sources"),
        (lambda f: (f.mkdir(), (f / "a.mp4").write_bytes(b"x")), [], r"no usable video among 1 sources"),
        (lambda f: f.mkdir(), ["--gap", "0"], "gap='0'"),
        (lambda f: (f.mkdir(), (f / "a.mp4").write_bytes(b"x")), ["--init", "./nothing"], "nothing does not exist"),
        (
            lambda f: (f.mkdir(), (f / "a.mp4").write_bytes(b"x")),
            ["--config", "no.json"],
            "config=no.json does not exist",
        ),
        (lambda f: (f.parent / "run").write_text(""), [], "is a file, but a folder is expected"),
    ],
)
def test_refusals_are_one_line_and_status_2(tmp_path, capsys, make, more, message):
    pytest.importorskip("tyro")
    make(tmp_path / "v")
    arguments = ["train-lam", str(tmp_path / "v"), "--output", str(tmp_path / "run"), "--preset", "tiny", *more]
    try:
        status = cli.main(arguments)
    except SystemExit as ended:  # tyro before 1.0 tells of settings that refuse their values itself, in a box
        assert more == ["--gap", "0"]
        status = ended.code
    err = capsys.readouterr().err
    assert status == 2
    assert message in err
    assert [line for line in err.splitlines() if line.startswith(("lara: train-lam: ", "╭─ Value error"))]
    assert "Traceback" not in err


def test_a_misspelt_field_of_the_model_is_corrected(tmp_path):
    (tmp_path / "c.json").write_text('{"codebok_size": 3}')
    settings = PretrainSettings(videos=(tmp_path,), output=tmp_path / "run", config=tmp_path / "c.json")
    with pytest.raises(LaraArgumentError, match=r"codebok_size; did you mean codebook_size\?"):
        settings.model_config()


def test_a_missing_folder_is_reported_before_a_model_is_made(tmp_path, monkeypatch):
    from lara_adapter.lam.pretrain import run as pretrain

    monkeypatch.setattr(pretrain, "make_model", lambda *a: pytest.fail("an image encoder would have been downloaded"))
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "does not exist"), ("empty", "no usable video among 0 sources")):
        with pytest.raises(LaraArgumentError, match=message):
            pretrain_lam(PretrainSettings(videos=(tmp_path / name,), output=tmp_path / "run"))


def test_a_missing_tracker_is_named(videos, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LaraArgumentError, match="wandb"):
        pretrain_lam(settings_of(videos, tmp_path / "run", small, tracker="wandb"))


def test_numbers_reach_tensorboard(videos, small, tmp_path):
    pytest.importorskip("tensorboard")
    pretrain_lam(settings_of(videos, tmp_path / "run", small, tracker="tensorboard"))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
