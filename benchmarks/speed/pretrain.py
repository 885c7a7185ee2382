"""Speed of stage 1 end to end, from video files on disk to the optimiser's step: ours against the official implementation.

    pip install "transformers==4.51.3" torchvision==0.22.1 av==15.0.0 lpips hydra-core omegaconf einops decord numpydantic \
        albumentations==1.4.18 pandas pyarrow dm-tree accelerate peft diffusers tqdm
    git clone https://github.com/lmy1001/LARA
    python -m benchmarks.speed.pretrain --official LARA/LARA_full      # or LARA_OFFICIAL_SRC; --preset paper|small

Both read the same dataset (layout v2.1, AV1 with a key frame every second frame, as LeRobot writes it; 256 x 256), pairs
5 frames apart, the same batch, model sizes and weights (random), AdamW, float32, one decoding worker each. Theirs is their
dataset (torchvision_av, as their configuration says), transforms and collation in a DataLoader, and their model. An arm's
turn begins with a fresh iterator and lasts until so many pairs are trained on, so that starting up and reading ahead are
counted. Arms take turns; what is reported is the median of the rounds' ratios of pairs per second.

"official" augments (crop, colour jitter) as theirs does; "official, plain" only resizes, as ours does, and is what ours is
compared with. "ours, independent pairs" shares no frames between pairs; "ours" draws chains of pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SVT_LOG", "1")

import numpy as np
import torch

from benchmarks import RESULTS, markdown
from benchmarks.checkout import lara_full
from benchmarks.speed.lam import make_backbone, make_official, make_ours
from benchmarks.speed.measure import environment, medians, ranges, ratios, take_turns
from lara_adapter.data import IndexSettings, PairStream, build_index, find_sources
from lara_adapter.data.gap import Gap
from lara_adapter.data.scan import scan_source
from lara_adapter.lam.pretrain.setup import move
from lara_adapter.lam.pretrain.shared_frames import share_frames
from lara_adapter.storage.files import read_json, write_json

RESULT = RESULTS / "pretrain_speed.json"
GAP, SIDE, FPS, CAMERA = 5, 256, 20, "observation.images.image"


def write_dataset(root: Path, episodes: int, frames: int) -> None:
    """A dataset in the layout v2.1: a square that moves over a textured ground, seen by a trembling camera."""
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    for episode in range(episodes):
        ground = rng.integers(0, 255, (SIDE // 8 + 4, SIDE // 8 + 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        path = root / "videos" / "chunk-000" / CAMERA / f"episode_{episode:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        place, speed = rng.uniform(0, SIDE - 48, 2), rng.uniform(-5, 5, 2)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libsvtav1", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
            stream.options = {"g": "2", "crf": "30", "preset": "10"}
            for _ in range(frames):
                shift = rng.integers(0, 3, 2)
                image = ground[shift[0] : shift[0] + SIDE, shift[1] : shift[1] + SIDE].copy()
                y, x = place.astype(int)
                image[y : y + 48, x : x + 48] = (250, 220, 30)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                speed = np.where((place + speed < 0) | (place + speed > SIDE - 48), -speed, speed)
                place = place + speed
            container.mux(stream.encode(None))
        table = {
            "timestamp": np.arange(frames) / FPS, "frame_index": range(frames), "episode_index": [episode] * frames,
            "index": range(episode * frames, (episode + 1) * frames), "task_index": [0] * frames,
        }  # fmt: skip
        path = root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    camera = {
        "dtype": "video", "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"],
        "info": {"video.channels": 3, "video.fps": FPS},
    }  # fmt: skip
    info = {
        "codebase_version": "v2.1", "fps": FPS, "total_episodes": episodes, "chunks_size": 1000,
        "features": {CAMERA: camera},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }  # fmt: skip
    write_json(root / "meta" / "info.json", info)
    write_json(root / "meta" / "stats.json", {})
    write_json(
        root / "meta" / "modality.json", {"state": {}, "action": {}, "video": {"image": {"original_key": CAMERA}}}
    )
    lines = [json.dumps({"episode_index": n, "tasks": ["move"], "length": frames}) for n in range(episodes)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    (root / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "move"}) + "\n")


def official_batches(data: Path, size: int, batch: int, workers: int, plain: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Their dataset, transforms and collation."""
    from lara_full.data.dataset import LeRobotSingleDataset, ModalityConfig
    from lara_full.data.transform.base import ComposedModalityTransform
    from lara_full.data.transform.concat import ConcatTransform
    from lara_full.data.transform.video import VideoColorJitter, VideoCrop, VideoResize, VideoToNumpy, VideoToTensor
    from moto.utils.collators import DefaultDataCollatorMotoTokenizer

    keys = ["video.image"]
    steps = [
        VideoToTensor(apply_to=keys),
        *([] if plain else [VideoCrop(apply_to=keys, scale=0.95)]),
        VideoResize(apply_to=keys, height=size, width=size, interpolation="linear"),
        *([] if plain else [VideoColorJitter(apply_to=keys, brightness=0.3, contrast=0.4, saturation=0.5, hue=0.08)]),
        VideoToNumpy(apply_to=keys),
        ConcatTransform(video_concat_order=keys),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = LeRobotSingleDataset(
            data, {"video": ModalityConfig(delta_indices=[0, GAP], modality_keys=keys)}, "new_embodiment", "torchvision_av",
            transforms=ComposedModalityTransform(transforms=steps),
        )  # fmt: skip
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch, shuffle=True, num_workers=workers, collate_fn=DefaultDataCollatorMotoTokenizer()
    )
    while True:
        yield from loader


def make_optimiser(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-4)


def make_arms(arguments: argparse.Namespace, data: Path, index: list[Any]) -> dict[str, Callable[[], Iterator[None]]]:
    """For each arm what makes a fresh iterator of training steps."""
    backbone = make_backbone(arguments.preset)
    ours = make_ours(arguments.preset, backbone).to(arguments.device)
    size = ours.config.image_size
    arms: dict[str, Callable[[], Iterator[None]]] = {}
    if arguments.official:
        for name in ("pytorch3d", "pytorch3d.transforms"):  # of state and action transforms only, and hard to install
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["pytorch3d"].transforms = sys.modules["pytorch3d.transforms"]  # type: ignore[attr-defined]
        theirs = make_official(ours, backbone).to(arguments.device)
        theirs.image_encoder.eval()
        optimiser = make_optimiser(theirs)

        def official(plain: bool) -> Iterator[None]:
            for batch in official_batches(data, size, arguments.batch, arguments.workers, plain):
                frames = torch.cat([batch["rgb_initial"], batch["rgb_future"]], dim=1).to(arguments.device)
                theirs(frames[:, 0], frames[:, 1]).loss.backward()
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                yield

        if not arguments.plain_only:
            arms["official"] = lambda: official(False)
        arms["official, plain"] = lambda: official(True)
    ours_optimiser = make_optimiser(ours)

    def mine(chain: int) -> Iterator[None]:
        stream = PairStream(
            index,
            size,
            arguments.batch,
            chain=chain,
            shuffle_frames=arguments.shuffle_frames,
            workers=arguments.workers,
        )
        for batch in stream.batches():
            batch = move(batch, torch.device(arguments.device))
            with share_frames(ours, batch):
                ours(*batch.pair()).loss.backward()
            torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
            ours_optimiser.step()
            ours_optimiser.zero_grad(set_to_none=True)
            yield

    arms["ours, independent pairs"] = lambda: mine(1)
    for chain in arguments.chains:
        arms[f"ours, chains of {chain}"] = lambda chain=chain: mine(chain)  # type: ignore[misc]
    return arms


def turn(arm: Callable[[], Iterator[None]], steps: int) -> float:
    """Seconds of a fresh iterator's first steps."""
    start = time.perf_counter()
    iterator = arm()
    for _ in range(steps):
        next(iterator)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    iterator.close()
    return taken


def decoding(arguments: argparse.Namespace, data: Path, index: list[Any], size: int) -> dict[str, float]:
    """Frames or pairs per second without any model, one worker, median of three."""
    source = index[0].source

    def seconds(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return median(taken)

    pairs = 256

    def ours() -> None:
        stream = PairStream(index, size, 32, shuffle_frames=arguments.shuffle_frames, workers=1)
        with contextlib.closing(stream.batches()) as batches:
            for _ in range(pairs // 32):
                next(batches)

    indexing = len(index[0].pts) / seconds(lambda: scan_source(source, Gap(GAP)))
    found = {"indexing, frames/s": indexing, "ours, pairs/s": pairs / seconds(ours)}
    if arguments.official:

        def theirs() -> None:
            batches = official_batches(data, size, 32, 0, True)
            for _ in range(pairs // 32):
                next(batches)

        found["official, plain, pairs/s"] = pairs / seconds(theirs)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one preset that is written."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "dataset"
        write_dataset(data, arguments.episodes, arguments.frames)
        settings = IndexSettings(gap=Gap(GAP), held_out=0.0, cut_threshold=0.0, still_threshold=0.0)
        index = build_index(find_sources([data]), settings, Path(folder) / "index").sources
        arms = make_arms(arguments, data, index)
        base = next(iter(arms)) if not arguments.official else "official, plain"
        for arm in arms.values():
            turn(arm, 1)  # warms up

        def pairs_per_second(name: str) -> float:
            speed = arguments.steps * arguments.batch / turn(arms[name], arguments.steps)
            print(f"{name}: {speed:.2f} pairs/s", flush=True)
            return speed

        speed = take_turns({name: functools.partial(pairs_per_second, name) for name in arms}, arguments.rounds)
        relative = ratios(speed, base)
        return {
            "relative_to": base,
            "pairs_per_second_ratio": medians(relative),
            "ratio_range": ranges(relative),
            "pairs_per_second_here": medians(speed),
            "decoding_alone": decoding(arguments, data, index, 224 if arguments.preset == "paper" else 64),
            "settings": {
                name: getattr(arguments, name)
                for name in (
                    "preset", "batch", "steps", "rounds", "workers", "device", "episodes", "frames", "shuffle_frames"
                )
            } | {"threads": torch.get_num_threads(), "gap": GAP, "side": SIDE, "codec": "AV1, key frame every 2"},
            "environment": environment(arguments.device, ("torch", "transformers", "av")),
        }  # fmt: skip


def section() -> str:
    """The table of the committed record."""
    presets = [read_json(RESULT)[preset] for preset in ("paper", "small")]

    def ratio(preset: dict[str, Any], arm: str) -> str:
        if arm not in preset["pairs_per_second_ratio"]:
            return "not measured"
        return markdown.spread(preset["pairs_per_second_ratio"][arm], *preset["ratio_range"][arm])

    labels = {
        "official, as it is": "official", "ours, independent pairs": "ours, independent pairs",
        "ours, chains of 4 (default)": "ours, chains of 4", "ours, chains of 8": "ours, chains of 8",
    }  # fmt: skip
    rows = [("official, no augmentation", "1.00", "1.00")]
    rows += [(label, *(ratio(preset, arm) for preset in presets)) for label, arm in labels.items()]
    alone = [preset["decoding_alone"] for preset in presets]
    ratios = [f"{rates['ours, pairs/s'] / rates['official, plain, pairs/s']:.1f}" for rates in alone]
    head = ["", *(f"{preset['settings']['preset']} sizes, batch {preset['settings']['batch']}" for preset in presets)]
    return markdown.table(head, [*rows, ("decoding alone, ours over theirs", *ratios)])


SECTIONS = {"docs/latent-action-models.md": {"pretraining speed": section}}


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=lara_full, default=os.environ.get("LARA_OFFICIAL_SRC"))
    parser.add_argument("--preset", choices=["paper", "small"], default="paper")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain-only", action="store_true", help="leave the augmenting arm out")
    parser.add_argument("--chains", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--shuffle-frames", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    result[arguments.preset] = measure(arguments)
    write_json(arguments.out, result)
    for name, ratio in result[arguments.preset]["pairs_per_second_ratio"].items():
        low, high = result[arguments.preset]["ratio_range"][name]
        print(f"{name:<26}{ratio:>6.2f} x   ({low:.2f} - {high:.2f})")
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
