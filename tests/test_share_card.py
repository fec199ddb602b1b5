"""The card of a saved network says what it is, what its author knows, and how to load it."""

import torch
import yaml
from networks import perturbed
from saved import built, small

from sansmax.models.card import MARK
from sansmax.models.share import ModelCard, save_pretrained


def head_and_text(folder):
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_the_network_is_and_how_to_load_it(tmp_path):
    model = perturbed(built("sima_nano_12_p16", depth=1, num_classes=3))
    save_pretrained(model, tmp_path / "net", labels=["a", "b|c", "d"])
    head, text = head_and_text(tmp_path / "net")
    # whose weights they are, only their owner knows
    assert head["license"] == "unknown" and head["library_name"] == "timm"
    assert "| published code | https://github.com/UCDvision/sima (mit) |" in text
    assert {"timm", "transformers", "sansmax"} <= set(head["tags"])
    assert text.index("import sansmax\n") < text.index("import timm\n") < text.index("timm.create_model(")
    assert 'timm.create_model("local-dir:net", pretrained=True)' in text
    assert "SimA: Simple Softmax-free Attention for Vision Transformers, https://arxiv.org/abs/2206.08898" in text
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text
    assert "3: a, b\\|c, d" in text and "For research only" in text
    # where the folder lies is nobody's business
    assert str(tmp_path) not in text


def test_what_the_author_knows_is_on_the_card(tmp_path):
    rows = [{"set": "test", "patients": 40, "accuracy": 0.91234}, {"set": "other", "AUC": 0.5}]
    card = ModelCard("Breast", "Tiles: of biopsies.", "cc-by-4.0", rows, ["me/set"], "me/base", ["x"], "@a{b}")
    save_pretrained(small(), tmp_path, card=card)
    head, text = head_and_text(tmp_path)
    assert (head["license"], head["datasets"], head["base_model"]) == ("cc-by-4.0", ["me/set"], "me/base")
    assert "x" in head["tags"]
    assert "# Breast\n\nTiles: of biopsies.\n" in text
    assert "| set | patients | accuracy | AUC |\n| --- | --- | --- | --- |\n| test | 40 | 0.9123 |  |\n" in text
    assert "@a{b}" in text


def test_the_code_on_the_card_runs_beside_the_folder(tmp_path, monkeypatch, assert_same):
    model = small()
    save_pretrained(model, tmp_path / "net")
    code = (tmp_path / "net" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    x = torch.randn(1, 3, 32, 32)
    assert_same(found["model"](x), model(x))
    assert "Resize" in repr(found["transform"])


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    save_pretrained(small(), tmp_path)
    readme = tmp_path / "README.md"
    assert MARK in readme.read_text()
    first = readme.read_text()
    save_pretrained(small(depth=1), tmp_path)
    assert readme.read_text() != first
    readme.write_text("mine")
    save_pretrained(small(), tmp_path)
    assert readme.read_text() == "mine"
    save_pretrained(small(), tmp_path, card=ModelCard(title="new"))
    assert "# new\n" in readme.read_text()
