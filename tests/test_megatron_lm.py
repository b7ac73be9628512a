"""What scripts/megatron_lm.py calls equal. The script itself needs a checkout of Megatron-LM."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from scripts.megatron_lm import STEPS, Log, difference, main

RIGHT = {"lm loss": {1: 4.0, 2: 2.0}, "grad-norm": {1: 1.0, 2: 0.5}}


def test_the_largest_relative_difference() -> None:
    assert difference(RIGHT, RIGHT) == 0
    assert difference({**RIGHT, "grad-norm": {1: 1.0, 2: 0.55}}, RIGHT) == pytest.approx(0.1)
    assert difference({tag: {2: values[2]} for tag, values in RIGHT.items()}, RIGHT) == 0, "a resumed run's half"


@pytest.mark.parametrize(
    "found",
    [{}, {"lm loss": RIGHT["lm loss"]}, {**RIGHT, "grad-norm": {}}, {**RIGHT, "grad-norm": {3: 1.0}}]
    + [{**RIGHT, "grad-norm": {1: bad, 2: 0.5}} for bad in (math.nan, math.inf)],
)  # fmt: skip
def test_what_is_missing_or_not_finite_differs(found: dict[str, dict[int, float]]) -> None:
    assert difference(found, RIGHT) == math.inf


def test_norms_by_layer_make_the_grad_norm() -> None:
    log = Log(
        {"grad-norm": {1: 9.0}, "grad-norm/a": {1: 3.0, STEPS: 1.0}, "grad-norm/b": {1: 4.0}, "lm loss": {1: 1.0}}
    )
    assert log.layers() == {"grad-norm/a": {1: 3.0}, "grad-norm/b": {1: 4.0}}
    assert log.from_layers() == {"grad-norm": {1: 5.0}}


def test_another_folder_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "is no checkout of Megatron-LM: it has no pretrain_gpt.py" in capsys.readouterr().err
