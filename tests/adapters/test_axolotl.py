"""dist_clip.axolotl by contract only: axolotl itself does not run here (its packages need a GPU).

What stands for it is written after axolotl's ``integrations/base.py`` and ``integrations/config.py``.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

import pydantic
import transformers

import dist_clip

from . import hugging_face as hf


class BasePlugin:
    def __init__(self) -> None:
        pass

    def register(self, cfg: Any) -> None:
        pass


class DictDefault(dict):  # type: ignore[type-arg]
    """A dictionary that answers None for the keys that it lacks, as attributes and as items."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __missing__(self, key: str) -> None:
        return None


class BaseConfig(pydantic.BaseModel):
    learning_rate: float = 1e-3


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    base: Any = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    for name, module in {
        "axolotl": types.ModuleType("axolotl"),
        "axolotl.integrations": types.ModuleType("axolotl.integrations"),
        "axolotl.integrations.base": base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dist_clip.axolotl", raising=False)
    yield importlib.import_module("dist_clip.axolotl")
    sys.modules.pop("dist_clip.axolotl", None)
    vars(dist_clip).pop("axolotl", None)


@pytest.mark.parametrize(
    ("written", "policy", "guards"),
    [
        ({"policy": {"name": "logclip", "ratio": 4}, "guard": ["median"]}, dist_clip.LogClip(ratio=4), 1),
        ("global max_norm=0.5", dist_clip.GlobalNorm(0.5), 0),
        (None, dist_clip.recommended()["policy"], 1),
    ],
)
def test_axolotl_by_contract_only(axolotl: Any, written: Any, policy: Any, guards: int, tmp_path: Any) -> None:
    plugin = axolotl.ClipPlugin()
    module, name = plugin.get_input_args().rsplit(".", 1)
    merged = type("AxolotlInputConfig", (BaseConfig, getattr(importlib.import_module(module), name)), {})
    config = {"learning_rate": 1e-2} if written is None else {"learning_rate": 1e-2, "dist_clip": written}
    validated = DictDefault(merged(**config).model_dump())
    if isinstance(validated.dist_clip, dict):
        validated["dist_clip"] = DictDefault(validated.dist_clip)
    trainer = transformers.Trainer(
        model=hf.make_model(),
        args=transformers.TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True),
        train_dataset=hf.make_data(),
        data_collator=hf.collate,
    )
    plugin.post_trainer_create(validated, trainer)
    trainer.train()
    clipper = trainer.callback_handler.callbacks[0].clipper
    assert (clipper.steps, clipper.policy, len(clipper.memory.guards)) == (1, policy, guards)


def test_without_axolotl_the_error_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match=r"dist_clip\.axolotl needs axolotl"):
        dist_clip.axolotl  # noqa: B018
