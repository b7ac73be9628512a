"""recommended(): what it is, and that launchers and Megatron's flags mean the same by it."""

from __future__ import annotations

import argparse

import pytest
from torch import nn

import dist_clip
from dist_clip.megatron.flags import add_clip_args, guards_from_args, policy_from_args

SETTING = {"policy": dist_clip.LogClip(max_norm=0.5, post_max_norm=0.5), "guard": dist_clip.MedianGuard()}


def test_it_is_what_a_clipper_takes() -> None:
    assert dist_clip.recommended(0.5) == SETTING
    clipper = dist_clip.GradClipper(nn.Linear(2, 2), **dist_clip.recommended())
    assert clipper.policy == dist_clip.LogClip(post_max_norm=1.0)
    assert clipper.may_skip
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        dist_clip.recommended(0.0)


def test_launchers_take_it_unless_another_rule_is_named() -> None:
    tyro = pytest.importorskip("tyro")
    assert tyro
    from launch.train import parse

    clip = parse(["--max-norm", "0.5"]).clip
    assert {"policy": clip.policy(), "guard": clip.guards()} == {**SETTING, "guard": [SETTING["guard"]]}
    own = parse(["--clip", "recommended", "--guard", "skipabove", "--skipabove-max-norm", "10"]).clip
    assert own.guards() == [dist_clip.SkipAbove(10.0)]
    assert parse(["--clip", "logclip"]).clip.guards() == []
    with pytest.raises(SystemExit, match="--logclip-ratio does not go with --clip recommended"):
        parse(["--logclip-ratio", "3"])


def test_megatrons_flag_means_the_same() -> None:
    def parsed(*arguments: str) -> argparse.Namespace:
        return add_clip_args(argparse.ArgumentParser()).parse_args(["--grad-clip-mode", "recommended", *arguments])

    assert policy_from_args(parsed(), clip_grad=0.5) == SETTING["policy"]
    assert guards_from_args(parsed()) == [SETTING["guard"]]
    own = parsed("--grad-clip-guard", "skipabove", "--skipabove-max-norm", "10")
    assert guards_from_args(own) == [dist_clip.SkipAbove(10.0)]
    with pytest.raises(ValueError, match="--logclip-ratio does not go with --grad-clip-mode recommended"):
        policy_from_args(parsed("--logclip-ratio", "3"), clip_grad=1.0)
    with pytest.raises(ValueError, match="recommended clips at --clip-grad, which must be above 0"):
        policy_from_args(parsed(), clip_grad=0.0)
