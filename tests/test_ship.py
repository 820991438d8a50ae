"""`make ship` on a tiny base: every part, and again after a kill."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hildanext.config import SHIPPED_MODEL
from hildanext.model.loading import load_diffusion_lm
from support.training import write_base

RECIPE = Path(__file__).parents[1] / "recipes" / SHIPPED_MODEL


@pytest.fixture
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe as a module, with a tiny base, few prompts and two steps a part; no answers are stored beside it."""
    spec = importlib.util.spec_from_file_location("ship", RECIPE / "ship.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    write_base(tmp_path / "base", context=512)
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    for name in ("prompts.py", "words.json"):
        shutil.copyfile(RECIPE / name, recipe / name)
    raw = json.loads((RECIPE / "config.json").read_text(encoding="utf-8"))
    raw["model"] |= {"base": str(tmp_path / "base"), "dtype": "float32"}
    raw["data"] |= {"seq_len": 64, "eval_share": 0.2}
    for source in raw["data"]["sources"]:
        source |= {"max_new_tokens": 12}
    raw["noise"]["anchors"], raw["lora"]["rank"], raw["lora"]["draft_head"] = 4, 2, 4
    raw["train"] |= {"eval_every": 1, "eval_rows": 4, "save_every": 1}
    raw["sft"]["lr_warmup_steps"] = 0
    (recipe / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(module, "RECIPE", recipe)
    counts = {name: [(world, 12, skip) for world, _, skip in parts] for name, parts in module.PROMPTS.items()}
    monkeypatch.setattr(module, "PROMPTS", counts)
    short = {name: part | {"sft.steps": 2} for name, part in module.PARTS.items()}
    monkeypatch.setattr(module, "PARTS", short)
    where = ["ship.py", "--out", str(tmp_path / "out"), "--package", str(tmp_path / "package")]
    monkeypatch.setattr("sys.argv", where)
    return module


@pytest.mark.slow
def test_every_part_and_again_after_a_kill(ship: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ship.sft

    def killed(config: Any, part: str, resume: bool) -> Any:
        if part == "fifth" and not resume:
            train(config, part, resume=False)
            raise KeyboardInterrupt
        return train(config, part, resume=resume)

    monkeypatch.setattr(ship, "sft", killed)
    with pytest.raises(KeyboardInterrupt):
        ship.main()
    ship.main()
    package = tmp_path / "package"
    runs = json.loads((package / "training.json").read_text(encoding="utf-8"))["runs"]
    assert [run["steps"] for run in runs] == [2] * len(ship.PARTS)
    assert json.loads((package / "generation_config.json").read_text())["hilda"]["EXACT"]["tau_accept"] == 1.0
    config = ship.part_config("fifth").model.model_copy(update={"base": str(package)})
    lm, _ = load_diffusion_lm(config)
    assert lm.gated
    assert lm.record["tokens_trained"] == sum(run["tokens"] for run in runs)
