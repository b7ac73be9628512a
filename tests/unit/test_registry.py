"""The policy registry: names, options from the dataclass and its docstring, and what the command lines make of them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

import dist_clip
from dist_clip.policies import modes, options_of, parse_mode, registered, registry
from dist_clip.policies.command_line import PolicyFlag, import_modules, options_from_flags, policy_flags

BUILT_IN = {
    "global": dist_clip.GlobalNorm,
    "adagc": dist_clip.AdaGC,
    "logclip": dist_clip.LogClip,
    "zclip": dist_clip.ZClip,
    "autoclip": dist_clip.AutoClip,
    "agc": dist_clip.AGC,
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@dataclasses.dataclass(frozen=True)
class Halve(dist_clip.Policy):
    """Scale everything by a number.

    Args:
        strength: the scale, which is
            at most 100 % of the gradient.
        kind: "soft" or "hard".
        rounds: how often.
        quiet: say nothing.
        floor: a lower bound; None for none.
        table: what no flag can set.
    """

    strength: float
    kind: Literal["soft", "hard"] = "soft"
    rounds: int = 3
    quiet: bool = True
    floor: float | None = None
    table: tuple[float, ...] = (1.0,)
    scope: dist_clip.Scope = "tensor"

    def step(self, state: dist_clip.State, inputs: dist_clip.StepInputs) -> tuple[Any, dist_clip.State]:
        return inputs.norms * 0 + self.strength, state


# ---- options ---------------------------------------------------------------------------------------------------------


def test_the_built_in_policies_are_registered() -> None:
    assert BUILT_IN.items() <= registered().items()
    assert {parse_mode(mode)[0] for mode in modes()} == set(registered().values())


@pytest.mark.parametrize("name", registered())
def test_options_of_a_built_in_policy(name: str) -> None:
    cls = registered()[name]
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "scope"}
    options = {option.name: option for option in options_of(cls)}
    assert list(options) == list(fields)
    for option in options.values():
        assert option.default == fields[option.name].default
        assert option.type in (int, float, bool, str)
        assert option.default is None or type(option.default) is option.type
        assert option.optional or option.default is not None
        assert option.default in (*option.choices, *[option.default] * (not option.choices))
        assert len(option.help) > 10, f"{name}: the docstring's Args must say what {option.name} is"
        assert "\n" not in option.help


def test_options_one_by_one() -> None:
    options = {option.name: option for option in options_of(Halve)}
    assert list(options) == ["strength", "kind", "rounds", "quiet", "floor", "table"]
    assert options["strength"].help == "the scale, which is at most 100 % of the gradient."
    assert options["strength"].required
    assert (options["kind"].type, options["kind"].choices) == (str, ("soft", "hard"))
    assert (options["floor"].type, options["floor"].optional, options["floor"].default) == (float, True, None)
    assert (options["quiet"].type, options["quiet"].default) == (bool, True)
    assert options["table"].type is object


@pytest.mark.usefixtures("fresh")
def test_names() -> None:
    dist_clip.register("halve")(Halve)
    assert {"halve", "halve-shard", "halve-global"} <= set(modes())
    assert dist_clip.policy("halve-shard", strength=0.5) == Halve(0.5, scope="shard")
    with pytest.raises(ValueError, match=r"'halve' is taken by .*Halve"):
        dist_clip.register("halve")(dist_clip.ZClip)
    with pytest.raises(ValueError, match="lower-case letters and digits"):
        dist_clip.register("Half-Life")
    with pytest.raises(TypeError, match="halve has no option power; it has strength, kind"):
        dist_clip.policy("halve", power=1)


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_flags_of_a_policy() -> None:
    dist_clip.register("halve")(Halve)
    flags = {flag.dest: flag for flag in policy_flags()}
    assert [dest for dest in flags if dest.startswith("halve_")] == [
        "halve_strength", "halve_kind", "halve_rounds", "halve_quiet", "halve_floor",
    ]  # fmt: skip
    assert not any(dest.endswith("_max_norm") and not dest.endswith("_post_max_norm") for dest in flags)
    assert flags["halve_strength"].hint == "required"
    assert flags["halve_rounds"].hint == "default: 3"
    assert options_from_flags(Halve, {"halve_strength": 1.0, "seed": 3, "zclip_alpha": None}, "x") == {"strength": 1.0}
    with pytest.raises(ValueError, match="--zclip-alpha does not go with --clip halve"):
        options_from_flags(Halve, {"halve_strength": 1.0, "zclip_alpha": 0.5}, "--clip halve")
    with pytest.raises(ValueError, match="--clip halve needs --halve-strength"):
        options_from_flags(Halve, {}, "--clip halve")
    with pytest.raises(ValueError, match="--halve-floor does not go with --clip none"):
        options_from_flags(None, {"halve_floor": 1.0}, "--clip none")


def test_a_flag_is_named_after_rule_and_option() -> None:
    option = next(option for option in options_of(dist_clip.LogClip) if option.name == "warmup_steps")
    assert PolicyFlag("logclip", option).dest == "logclip_warmup_steps"


@pytest.mark.usefixtures("fresh")
def test_megatrons_flags_of_a_policy_of_ones_own() -> None:
    pytest.importorskip("megatron")
    from dist_clip import megatron

    dist_clip.register("halve")(Halve)
    parser = megatron.add_clip_args(argparse.ArgumentParser(), [])
    text = " ".join(parser.format_help().split())
    assert "--halve-strength HALVE_STRENGTH the scale, which is at most 100 % of the gradient. (required)" in text
    assert "--halve-kind {soft,hard}" in text
    assert "how often. (default: 3)" in text

    def made(*flags: str) -> Any:
        return megatron.policy_from_args(parser.parse_args(["--grad-clip-mode", "halve", *flags]), 1.0)

    assert made("--halve-strength", "0.5") == Halve(0.5)
    assert made("--halve-strength", "1", "--no-halve-quiet", "--halve-rounds", "2") == Halve(1.0, rounds=2, quiet=False)
    with pytest.raises(ValueError, match="--grad-clip-mode halve needs --halve-strength"):
        made()


@pytest.mark.usefixtures("fresh")
def test_launchs_parser_with_a_policy_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    from launch.train import parse

    dist_clip.register("halve")(Halve)
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "--halve-strength FLOAT halve: the scale, which is at most 100 % of the gradient. (required)" in text
    assert '--halve-kind {soft,hard} halve: "soft" or "hard". (default: soft)' in text
    assert "--halve-quiet, --no-halve-quiet halve: say nothing. (default: True)" in text
    assert parse(["--clip", "halve-global", "--halve-strength", "0.5"]).clip.policy() == Halve(0.5, scope="global")
    made = parse(["--clip", "halve", "--halve-strength", "1", "--no-halve-quiet"]).clip
    assert made.options == {"strength": 1.0, "quiet": False}
    with pytest.raises(SystemExit, match="--clip halve needs --halve-strength"):
        parse(["--clip", "halve"])


def test_launchs_parser_with_the_built_in_policies() -> None:
    pytest.importorskip("tyro")
    from launch.train import parse

    assert parse(["--clip", "logclip"]).clip.policy() == dist_clip.LogClip()
    assert parse(["--clip", "zclip", "--max-norm", "2"]).clip.policy() == dist_clip.ZClip(max_norm=2.0)
    given = ["--clip", "adagc-shard", "--adagc-gamma-init", "median", "--adagc-beta", "0.9"]
    assert parse(given).clip.policy() == dist_clip.AdaGC(gamma_init="median", beta=0.9, scope="shard")
    spikes = ["--clip", "zclip", "--zclip-skip-update-on-spike"]
    assert parse(spikes).clip.policy() == dist_clip.ZClip(skip_update_on_spike=True)
    for clip in modes():
        assert parse(["--clip", clip]).clip.policy() == dist_clip.policy(clip)
    for flags, message in (
        (["--adagc-beta", "0.9"], "--adagc-beta does not go with --clip recommended"),
        (
            ["--clip", "none", "--zclip-skip-update-on-spike"],
            "--zclip-skip-update-on-spike does not go with --clip none",
        ),
        (["--clip", "logclip", "--logclip-ratio", "0.5"], r"ratio must be above 1, got 0\.5"),
    ):
        with pytest.raises(SystemExit, match=message):
            parse(flags)


# ---- guards ----------------------------------------------------------------------------------------------------------


def test_guards_by_name() -> None:
    assert dist_clip.guard("skipabove", max_norm=3.0) == dist_clip.SkipAbove(3.0)
    assert [dist_clip.guard(name) for name in ("median", "skipstep", "dropnorm")] == [
        dist_clip.MedianGuard(), dist_clip.SkipStep(), dist_clip.DropNorm(),
    ]  # fmt: skip


def test_launchs_flags_of_guards() -> None:
    pytest.importorskip("tyro")
    from launch.train import parse

    assert parse(["--clip", "logclip"]).clip.guards() == []
    flags = ["--guard", "median", "skipstep", "--median-threshold", "4", "--no-skipstep-loss"]
    assert parse(flags).clip.guards() == [dist_clip.MedianGuard(threshold=4.0), dist_clip.SkipStep(loss=False)]
    assert parse(["--guard", "skipabove", "--skipabove-max-norm", "9"]).clip.guards() == [dist_clip.SkipAbove(9.0)]
    for wrong, message in (
        (["--guard", "skipabove"], "--guard skipabove needs --skipabove-max-norm"),
        (["--guard", "median", "--dropnorm-factor", "9"], "--dropnorm-factor does not go with --guard median"),
        (["--dropnorm-factor", "9"], "--dropnorm-factor does not go with a command line without --guard"),
        (["--guard", "median", "--median-threshold", "1"], r"threshold must be above 1, got 1\.0"),
    ):
        with pytest.raises(SystemExit, match=message):
            parse(wrong)


def test_megatrons_flags_of_guards(tmp_path: Path) -> None:
    pytest.importorskip("megatron")
    from dist_clip import megatron
    from dist_clip.megatron.launcher import main

    parser = megatron.add_clip_args(argparse.ArgumentParser(), [])
    mode = ["--grad-clip-mode", "logclip"]
    flags = ["--grad-clip-guard", "median", "dropnorm", "--dropnorm-variant", "std", "--median-when-stuck", "raise"]
    made = megatron.guards_from_args(parser.parse_args([*mode, *flags]))
    assert made == [dist_clip.MedianGuard(when_stuck="raise"), dist_clip.DropNorm("std")]
    assert megatron.guards_from_args(parser.parse_args(mode)) == []
    with pytest.raises(ValueError, match="--grad-clip-guard without --grad-clip-mode"):
        megatron.policy_from_args(parser.parse_args(["--grad-clip-guard", "median"]), 1.0)
    with pytest.raises(ValueError, match="--skipabove-max-norm does not go with --grad-clip-guard median"):
        megatron.guards_from_args(
            parser.parse_args([*mode, "--grad-clip-guard", "median", "--skipabove-max-norm", "3"])
        )
    script = tmp_path / "script.py"
    script.write_text("")
    with pytest.raises(SystemExit, match="SkipStep looks at the loss, which Megatron's loop does not hand"):
        main([str(script), *mode, "--grad-clip-guard", "skipstep"])


# ---- modules of ones own ---------------------------------------------------------------------------------------------

MODULE = '''
import dataclasses
import dist_clip


@dist_clip.register("{name}")
@dataclasses.dataclass(frozen=True)
class Third(dist_clip.Policy):
    """Scale by a third.

    Args:
        shift: added to the scale.
    """

    shift: float = 0.0

    def step(self, state, inputs):
        return inputs.norms * 0 + (1 / 3 + self.shift), state
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> str:
    """Name of a module that registers "third"."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rules_of_ones_own.py").write_text(MODULE.format(name="third"))
    (tmp_path / "broken_rules.py").write_text("import dist_clip\ndist_clip.register('Not a name')\n")
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "rules_of_ones_own", raising=False)
    return "rules_of_ones_own"


def test_launch_takes_a_module(module: str) -> None:
    pytest.importorskip("tyro")
    from launch.train import parse

    cfg = parse(["--clip", "third", "--policy-module", module, "--third-shift", "0.5"])
    assert cfg.clip.policy().config() == {"policy": "Third", "shift": 0.5}
    assert cfg.clip.policy_module == (module,)
    for wrong, why in (("nowhere", "No module named 'nowhere'"), ("broken_rules", "ValueError: a policy's name")):
        with pytest.raises(SystemExit, match=rf"--policy-module {wrong}: cannot be imported \(.*{why}"):
            parse(["--policy-module", wrong])


def test_add_clip_args_takes_a_module(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line of the script, whose parser is not built yet."""
    pytest.importorskip("megatron")
    from dist_clip import megatron

    flags = ["--grad-clip-mode", "third", f"--grad-clip-module={module}", "--third-shift", "0.5"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--lr", "1", *flags])
    args = megatron.add_clip_args(argparse.ArgumentParser()).parse_args(flags)
    made = megatron.policy_from_args(args, 1.0)
    assert made is not None
    assert made.config() == {"policy": "Third", "shift": 0.5}
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--grad-clip-module", "nowhere"])
    with pytest.raises(ImportError, match="--grad-clip-module nowhere: cannot be imported"):
        megatron.add_clip_args(argparse.ArgumentParser())


def test_several_modules(module: str, tmp_path: Path) -> None:
    (tmp_path / "more_rules.py").write_text(MODULE.format(name="more").replace("Third", "More"))
    import_modules("--policy-module", ["--policy-module", module, "--seed", "1", "--policy-module", "more_rules"])
    assert {"third", "more"} <= set(registered())
