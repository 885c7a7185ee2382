"""The model card: what is known, never a local path, and a user's own words stay."""

from __future__ import annotations

import re
import sys

import pytest
import yaml
from helpers.toys import DitPolicy, make_batch
from helpers.trained import build, lara_on, optimizer_of, train
from huggingface_hub import ModelCard

from lara_adapter.metrics import History
from lara_adapter.saving import card


def front(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


@pytest.fixture
def lara():
    policy = build()
    lara = lara_on(policy, token="mean_valid")
    for _ in range(3):
        policy(make_batch())["loss"].backward()
        lara.metrics()
    return lara


def save(lara, folder, **told):
    lara.save_pretrained(folder, **told)
    return (folder / "README.md").read_text()


def test_what_is_known_is_there(lara, tmp_path):
    lara.config.origins["lam"] = {"repo_id": "alice/lam", "revision": "1" * 40}
    lara.config.origins["policy"] = {"repo_id": "bob/policy", "revision": "2" * 40}
    text = save(
        lara, tmp_path / "a", save_policy="trainable", dataset=["carol/data", "kitchen (part 2)"], license="mit"
    )
    data = front(text)
    assert data["library_name"] == "lara-adapter"
    assert data["pipeline_tag"] == "robotics"
    assert data["base_model"] == "bob/policy"
    assert data["license"] == "mit"
    assert data["datasets"] == ["carol/data"]
    assert {"lara", "arxiv:2606.07100"} <= set(data["tags"])
    (entry,) = data["model-index"]
    assert entry["results"][0]["metrics"][0]["type"] == "cosine"
    assert ModelCard(text).data.eval_results[0].dataset_type == "carol/data"  # as the Hub's own client reads it
    for said in (
        "2" * 40, "1" * 40, "alice/lam", "`Host`, family `generic`", "layer 3 of 5, token mean_valid", "mlp, cosine",
        "0.3, 0.2", "kitchen (part 2)", "| training forwards | 3 |", "| cosine |", "inference=True",
        "@inproceedings{lara2026", "its trained weights", "| licence | mit |",
    ):  # fmt: skip
        assert said in text, said
    names = {name for name, _ in re.findall(r"^\| (\w+) \| (-?[\d.e-]+) \|$", text, re.MULTILINE)}
    assert names == set(lara.metrics())


def test_nothing_is_claimed_that_is_not_known(lara, tmp_path):
    text = save(lara, tmp_path / "a")
    data = front(text)
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "inference=True" not in text
    assert "none of these files is needed" in text
    assert "base model |" not in text


def test_never_a_local_path(lara, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "secret").mkdir(parents=True)
    for place in (
        str(tmp_path / "secret-base"),
        "./secret",
        "~/secret",
        "C:\\secret",
        "data/secret",
        "a/b/secret",
        "../secret",
    ):
        text = save(lara, tmp_path / "a", base_model=place, dataset=[place], license=place)
        assert "secret" not in text, place
        assert str(tmp_path) not in text
        assert "\\" not in text
    assert "is left out" in caplog.text
    for word in ("/tmp", "/home", "/root", str(tmp_path)):
        assert word not in text


def test_of_a_users_card_only_our_part_changes(lara, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    mine = "---\nlicense: gpl-3.0\ntags:\n- mine\nbase_model: me/base\ncustom: 7\n---\n\n# My robot\n\nMine --- all mine.\n"
    (folder / "README.md").write_text(mine)
    text = save(lara, folder, base_model="other/base", dataset="carol/data")
    data = front(text)
    assert data["license"] == "gpl-3.0"
    assert data["custom"] == 7
    assert data["base_model"] == "other/base"  # said in so many words
    assert data["tags"][0] == "mine"
    assert "lara" in data["tags"]
    assert "# My robot\n\nMine --- all mine." in text
    (folder / "README.md").write_text(text.replace("Mine --- all mine.", "Edited.") + "\nAfter.\n")
    lara.step = 77
    text = save(lara, folder)
    assert "Edited." in text
    assert text.endswith("After.\n")
    assert text.count("lara-adapter: begin") == text.count("lara-adapter: end") == 1
    assert "| training forwards | 77 |" in text
    data = front(text)
    assert data["base_model"] == "other/base"
    assert data["datasets"] == ["carol/data"]
    assert len(data["model-index"]) == 1
    assert save(lara, folder) == text


@pytest.mark.parametrize(
    "old", ["no front matter", "---\n: [broken\n---\nText", "---\n- a\n---\nText", "", "---\n---\nText"]
)
def test_a_card_that_is_odd_is_neither_lost_nor_fatal(lara, tmp_path, old):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "README.md").write_text(old)
    text = save(lara, folder)
    assert "lara-adapter: begin" in text
    for line in old.splitlines():
        assert line in text


def test_a_card_that_is_no_text_is_replaced(lara, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_bytes(b"\xff\xfe\x00")
    assert "LARA adapter for Host" in save(lara, tmp_path / "a")


def test_the_repository_is_filled_in_where_it_is_known(lara):
    facts = card.Facts.from_adapter(lara, base_model=None, dataset=None, license=None)
    assert 'load_lara(policy, "alice/adapter")' in card.render(facts, None, "alice/adapter")
    facts.lora = True
    assert 'PeftModel.from_pretrained(policy, "alice/adapter", subfolder="policy_lora"' in card.render(
        facts, None, "alice/adapter"
    )


def test_the_picture(lara, tmp_path):
    pytest.importorskip("matplotlib")
    text = save(lara, tmp_path / "a")
    assert "![Training curves](lara_training.png)" in text
    assert (tmp_path / "a" / "lara_training.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture_and_no_error(lara, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "lara_training.png" not in save(lara, tmp_path / "a")
    assert not (tmp_path / "a" / "lara_training.png").exists()


def test_a_diverged_adapter_can_be_saved(lara, tmp_path):
    lara._values["align_loss"] = float("nan")
    assert "Last training step" not in save(lara, tmp_path / "a")


def test_the_history_is_bounded_and_spans_everything():
    history = History(limit=64)
    for step in range(1, 20_001):
        history.record(step, {"cosine": step / 20_000})
    steps, values = history.series("cosine")
    assert 32 <= len(steps) <= 64
    assert steps[0] == 1
    assert steps[-1] > 19_000
    assert all(value == step / 20_000 for step, value in zip(steps, values))
    assert max(b - a for a, b in zip(steps, steps[1:])) < 1_000  # noqa: RUF007
    history.record(500, {"cosine": 0.0})  # a run that went back
    assert history.series("cosine")[0][-1] <= 500
    assert history.series("lam_loss") == ([], [])


def test_metrics_fill_the_history_and_a_run_without_logging_keeps_nothing():
    policy = DitPolicy().train()
    lara = lara_on(policy)
    train(policy, optimizer_of(policy), range(2))
    assert lara.history.points == []
    lara.metrics()
    assert [step for step, _ in lara.history.points] == [2]
