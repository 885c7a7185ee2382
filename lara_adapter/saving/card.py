"""The model card of an adapter; it never names a local path.

In an existing card our block between two markers is replaced and missing metadata is added; the rest is kept.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import LaraConfig
from ..errors import NonFiniteError
from ..metrics import History
from .layout import CURVE_FILE

__all__ = ["Facts", "draw_curve", "public_name", "read_card", "render"]

logger = logging.getLogger(__name__)

_BEGIN = "<!-- lara-adapter: begin; the text up to the end mark is rewritten by each save -->"
_END = "<!-- lara-adapter: end -->"
_BLOCK = re.compile(r"<!-- lara-adapter: begin[^>]*-->.*?<!-- lara-adapter: end -->", re.DOTALL)
_FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_REPO = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_NAME = re.compile(r"[\w-][\w .()-]{0,95}")
_MAX_BYTES = 2**20
_CURVES = (("cosine", "cosine to the latent action"), ("align_loss", "alignment loss"), ("lam_loss", "loss of the LAM"),
           ("mean_direction", "mean direction (1: constant)"))  # fmt: skip
_CITATION = """@inproceedings{lara2026,
  title     = {LARA: Latent Action Representation Alignment for Vision-Language-Action Models},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2026},
  note      = {arXiv:2606.07100}
}"""


def public_name(value: Any, what: str) -> str | None:
    """`value` if it is a Hub id or a plain name; None, with a warning, if it is or looks like a local path."""
    text = str(value)
    if (_REPO.fullmatch(text) or _NAME.fullmatch(text)) and not Path(text).exists():
        return text
    logger.warning("model card: %s is left out: it looks like a local path, but a Hub id or a name is expected", what)
    return None


@dataclass
class Facts:
    """The content of a card.

    Attributes:
        config: the settings.
        metrics: of the last training forward; empty before the first.
        steps: training forwards.
        base_model: Hub id of the policy.
        datasets: Hub ids or names.
        license: as the Hub writes it.
        overridden: metadata that the caller passed, which replace those of an existing card.
        lora: whether the folder holds LoRA of the policy.
        policy: whether it holds trained weights of it.
        curve: whether it holds the picture of the training.
    """

    config: LaraConfig
    metrics: dict[str, float]
    steps: int
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    license: str | None = None
    overridden: set[str] = field(default_factory=set)
    lora: bool = False
    policy: bool = False
    curve: bool = False

    @classmethod
    def from_adapter(
        cls, adapter: Any, *, base_model: str | None = None, dataset: str | Sequence[str] | None = None,
        license: str | None = None,
    ) -> Facts:  # fmt: skip
        """The facts of an adapter, with the user's metadata."""
        try:
            metrics = adapter.metrics()
        except NonFiniteError:  # a diverged run may be saved too
            metrics = {}
        facts = cls(adapter.config, metrics, adapter.step)
        datasets: Iterable[str] = (dataset,) if isinstance(dataset, str) else dataset or ()
        facts.datasets = [name for value in datasets if (name := public_name(value, "dataset"))]
        facts.base_model = public_name(base_model, "base_model") if base_model is not None else None
        facts.license = public_name(license, "license") if license is not None else None
        facts.overridden = {name for name in ("base_model", "datasets", "license") if getattr(facts, name)}
        facts.base_model = facts.base_model or adapter.config.origins.get("policy", {}).get("repo_id")
        return facts


def read_card(path: Path) -> str | None:
    """The text of an existing card; None if there is none, or it is not text."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def render(facts: Facts, old: str | None = None, repo_id: str | None = None) -> str:
    """The text of a card: a new one, or the `old` one brought up to date; `repo_id`: where it will be, if known."""
    block = f"{_BEGIN}\n{_body(facts, repo_id)}\n{_END}"
    if not old or not old.strip():
        return f"---\n{_dump(_metadata(facts))}---\n\n# LARA adapter for {facts.config.policy_class}\n\n{block}\n"
    front = _FRONT.match(old)
    text = old[front.end() :] if front else old
    if _BLOCK.search(text):
        text = _BLOCK.sub(lambda _: block, text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{block}\n"
    return _merged_front(facts, front) + text


def _merged_front(facts: Facts, front: re.Match[str] | None) -> str:
    import yaml  # a dependency of huggingface_hub

    ours = _metadata(facts)
    if front is None:
        return f"---\n{_dump(ours)}---\n\n"
    try:
        theirs = yaml.safe_load(front[1]) or {}
        if not isinstance(theirs, dict):
            raise ValueError("not a mapping")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        logger.warning("the metadata of the existing model card are kept as they are: they cannot be read (%s)", error)
        return front[0]
    merged = dict(theirs)
    for name, value in ours.items():
        existing = theirs.get(name)
        if name in ("tags", "datasets") and isinstance(existing, (list, str)):
            existing = [existing] if isinstance(existing, str) else existing
            merged[name] = [*existing, *(item for item in value if item not in existing)]
        elif name == "model-index" and isinstance(existing, list):
            own = {entry["name"] for entry in value}
            merged[name] = [e for e in existing if not (isinstance(e, dict) and e.get("name") in own)] + value
        elif existing is None or name in facts.overridden:
            merged[name] = value
    return front[0] if merged == theirs else f"---\n{_dump(merged)}---\n"


def _dump(metadata: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return text


def _metadata(facts: Facts) -> dict[str, Any]:
    """The front matter, as the Hub reads it."""
    hub_id = facts.base_model if facts.base_model and _REPO.fullmatch(facts.base_model) else None
    listed = [name for name in facts.datasets if _REPO.fullmatch(name)]
    metadata: dict[str, Any] = {
        "library_name": "lara-adapter",
        "pipeline_tag": "robotics",
        "license": facts.license,
        "base_model": hub_id,
        "base_model_relation": "adapter" if hub_id else None,
        "datasets": listed,
        "tags": ["lara", "latent-action", "vision-language-action", "arxiv:2606.07100"],
    }
    if listed and facts.metrics:
        metrics = [
            {"type": name, "name": f"{name} (training)", "value": round(facts.metrics[name], 6)}
            for name in ("cosine", "align_loss", "reconstruction_over_copy", "perplexity")
            if name in facts.metrics
        ]
        result = {"task": {"type": "robotics"}, "dataset": {"type": listed[0], "name": listed[0]}, "metrics": metrics}
        metadata["model-index"] = [{"name": f"LARA adapter for {facts.config.policy_class}", "results": [result]}]
    return {name: value for name, value in metadata.items() if value}


def _body(facts: Facts, repo_id: str | None) -> str:
    parts = [
        f"Made with lara_adapter {facts.config.lara_version}: LARA, Latent Action Representation Alignment\n"
        "([arXiv 2606.07100](https://arxiv.org/abs/2606.07100)), on a policy in training.",
        _table(("", ""), _rows(facts)),
    ]
    if facts.metrics:
        rows = [(name, f"{value:.4g}") for name, value in sorted(facts.metrics.items())]
        parts.append(f"## Last training step\n\n{_table(('metric', 'value'), rows)}")
    if facts.curve:
        parts.append(f"![Training curves]({CURVE_FILE})")
    parts += [_usage(facts, repo_id or "user/this-repository"), f"## Citation\n\n```bibtex\n{_CITATION}\n```"]
    return "\n\n".join(parts)


def _rows(facts: Facts) -> list[tuple[str, str]]:
    c = facts.config

    def origin(name: str) -> str | None:
        value = c.origins.get(name)
        return f"{_link(value['repo_id'])} at `{value['revision']}`" if value else None

    base = origin("policy")
    if facts.base_model and (base is None or c.origins["policy"]["repo_id"] != facts.base_model):
        base = _link(facts.base_model)
    saved = [name for name, held in (("its LoRA", facts.lora), ("its trained weights", facts.policy)) if held]
    rows = [
        ("base model", base),
        ("policy", f"`{c.policy_class}`, family `{c.policy_family}`"),
        ("saved of the policy", " and ".join(saved) or "nothing, see its own checkpoint"),
        ("aligned state", f"layer {c.layer} of {c.depth}, token {_text(c.token)}"),
        ("projector, alignment", f"{_text(c.projector)}, {_text(c.alignment)}"),
        ("weights w1, w2", f"{_text(c.align_weight)}, {_text(c.lam_weight)}"),
        ("gradient to the LAM", f"x {c.lam_grad_scale:g}" if c.train_lam else "none, the LAM is frozen"),
        (
            "pairs reconstructed",
            f"{c.reconstruct:.0%}, drawn at each step" if c.train_lam and c.reconstruct < 1 else None,
        ),
        ("latent action model", f"in `lam/`, latent of {c.latent_width} numbers"),
        ("LAM started from", origin("lam")),
        ("its image encoder", origin("image_encoder")),
        ("data", ", ".join(_link(name) if "/" in name else name for name in facts.datasets)),
        ("training forwards", f"{facts.steps:,}"),
        ("licence", facts.license),
    ]
    return [(name, value) for name, value in rows if value]


def _text(value: Any) -> str:
    if value is None:
        return "custom"
    if isinstance(value, dict):
        return " ".join([str(next(iter(value.values()))), *(f"{k}={v}" for k, v in list(value.items())[1:])])
    return str(value)


def _link(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})" if _REPO.fullmatch(repo_id) else repo_id


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    cells = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {line} |" for line in cells)])


def _usage(facts: Facts, repo_id: str) -> str:
    load = f'policy = PeftModel.from_pretrained(policy, "{repo_id}", subfolder="policy_lora", is_trainable=True)\n'
    wrap = f"from peft import PeftModel\n\n{load}" if facts.lora else ""
    text = (
        "## Use\n\nTo go on training, with `policy` the base model:\n\n```python\nfrom lara_adapter import load_lara\n"
        f'{wrap}lara = load_lara(policy, "{repo_id}")\n```\n\n'
    )
    if not (facts.lora or facts.policy):
        return f"{text}To act, load the policy alone; none of these files is needed."
    merge = ", merge=True" if facts.lora else ""
    return (
        f"{text}To act; nothing of LARA is loaded:\n\n```python\nfrom lara_adapter import load_lara\n\n"
        f'policy = load_lara(policy, "{repo_id}", inference=True{merge})\n```'
    )


def draw_curve(history: History, path: Path) -> bool:
    """Draw the metrics of the training as a PNG; False without metrics or without matplotlib."""
    series = [(title, *history.series(name)) for name, title in _CURVES]
    series = [entry for entry in series if len(entry[1]) > 1]
    if not series:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 * len(series), 2.6), layout="constrained")
        FigureCanvasAgg(figure)
        for place, (title, steps, values) in zip(figure.subplots(1, len(series), squeeze=False)[0], series):
            place.plot(steps, values, linewidth=1.2)
            place.set_title(title, fontsize=9)
            place.set_xlabel("training forward", fontsize=8)
            place.tick_params(labelsize=7)
            place.grid(alpha=0.3)
        figure.savefig(path, dpi=110)
    except ImportError:
        return False
    except Exception as error:  # a picture is not worth a checkpoint
        logger.warning("model card: no picture of the training (%s: %s)", type(error).__name__, error)
        path.unlink(missing_ok=True)
        return False
    return True
