"""Compares what the ranks recorded of a random case with the single-process reference, step by step.

Tolerances. Norms, scales and gamma are float32 scalars: 1e-6 is a few roundings. Below float32's normal range a scalar has
an absolute resolution instead (1.4e-45), and what is computed from a gamma down there inherits its relative error. A
clipped gradient has its scale's error and the rounding of the product to its dtype. What is not scaled keeps its bits.

ZClip's mean, variance and threshold follow from norms, each of which has an error of its own. A variance that is small
beside the square of the mean is a difference of numbers that are nearly equal: it inherits their errors enlarged.
`MomentErrors` carries them along, so that each state is as exact as its own norms allow, and no less.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import re
import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dist_clip
from tests import reference
from tests.reference import fp32

from . import cases
from .cases import Case, Hand

RTOL = 1e-6
SUBNORMAL = 4e-45
"""Three of float32's smallest steps: one for each rounding of a value down there."""
SPACING = {"float64": 5e-324, "float32": 1.5e-45, "bfloat16": 9.2e-41, "float16": 6e-8}
"""The distance between the smallest values of a dtype."""
NORM = 3e-7
"""Relative error of a norm: one that is summed in float32 is off by some roundings (6e-8 each)."""
ROUNDING = {"float64": 1e-15, "float32": 1.2e-7, "bfloat16": 2**-7, "float16": 2**-10}
"""One step of a dtype, relative: two products that differ by little may be rounded to neighbours."""

Key = Any  # a tensor's name, or (name, number) of one of its distinct pieces


class Mismatch(AssertionError):
    """What differs from the reference, where."""


def require(condition: Any, *what: Any) -> None:
    if not condition:
        raise Mismatch(", ".join(map(str, what)))


def close(actual: float | None, expected: float, atol: float = SUBNORMAL, rtol: float = RTOL) -> bool:
    """Also NaN with NaN. Both are float32 values by now: beyond its range Inf."""
    if actual is None:
        return False
    if math.isnan(expected) or math.isnan(actual):
        return math.isnan(expected) and math.isnan(actual)
    if math.isinf(expected) or math.isinf(actual):
        return actual == expected
    return abs(actual - expected) <= rtol * abs(expected) + atol


def check(case: Case, ranks: list[dict[str, Any]]) -> None:
    errors = {rank: result["error"] for rank, result in enumerate(ranks) if "error" in result}
    require(not errors, *(f"rank {rank} raised\n{error}" for rank, error in errors.items()))
    Checker(case, ranks).run()


@dataclasses.dataclass
class MomentErrors:
    """How far ZClip's mean, variance and threshold may be off, when each norm is off by `NORM`, relative to itself.

    To first order, with x the norms, m their mean, a the decay, and d the error of each:

    - the record's variance sum (x - m)^2 / k: 2 / k * sum |x - m| dx, since the deviations from a mean add up to 0, so
      that the error of m drops out;
    - m' = a m + (1 - a) t and v' = a v + (1 - a) (t - m')^2: with t - m' = a (t - m), dv' = a dv + (1 - a) a^2 *
      2 |t - m| (dt + dm), where t is the norm or, of a spike, the threshold.

    To each, the square of the error is added: it is what remains where norms are all but equal. The threshold's error
    is the largest over the corners of the errors of its arguments, for the root of a small variance is not linear.
    """

    mean: float = 0.0
    var: float = 0.0
    largest: float = 0.0  # mean so far: float64 loses what is small beside its square

    def follow(self, rule: reference.ZClip, norm: float) -> float:
        """Take in the norm that `rule` gets next. Returns how far the scale may be off, beside the norm's own error."""
        error = NORM * norm
        if not reference.observable(norm):
            return 0.0
        if len(rule.record) < rule.warmup_steps:
            record = [*rule.record, norm]
            mean = statistics.fmean(record)
            self.mean = NORM * mean
            self.var = 2 * NORM * statistics.fmean(abs(x - mean) * x for x in record) + (NORM * max(record)) ** 2
            self.largest = max(self.largest, mean)
            return 0.0
        threshold = rule.threshold(norm)
        if threshold is not None:
            error = self.threshold_error(rule, norm)
            if rule.skip_update_on_spike:
                return error / norm
        a, target = rule.alpha, norm if threshold is None else threshold
        off = error + self.mean
        self.var = a * self.var + (1 - a) * a**2 * (2 * abs(target - rule.mean) * off + off**2)
        self.mean = a * self.mean + (1 - a) * error
        self.largest = max(self.largest, a * rule.mean + (1 - a) * target)
        return error / norm if threshold is not None else 0.0

    def threshold_error(self, rule: reference.ZClip, norm: float) -> float:
        usual = rule.limit(norm, rule.mean, rule.var)
        others = []
        for i, j, k in itertools.product((-1, 1), repeat=3):
            near, mean = norm * (1 + i * NORM), rule.mean + j * self.mean
            others.append(rule.limit(near, mean, max(0.0, rule.var + k * self.var)) if near > mean else near)
        return max(abs(other - usual) for other in others)


@dataclasses.dataclass
class Group:
    """The tensors that one policy rules, and the reference of it."""

    pattern: str
    policy: Any
    rule: Any
    names: list[str]
    errors: dict[Key, MomentErrors] = dataclasses.field(default_factory=dict)  # of ZClip
    smallest: dict[Key, float] = dataclasses.field(default_factory=dict)  # smallest level so far, of LogClip

    @property
    def shards(self) -> bool:
        return self.scope == "shard"

    def level_error(self, key: Key) -> float:
        """Relative error of LogClip's level, beside RTOL: it moves by factors, so what was lost when it was small stays."""
        return SUBNORMAL / self.smallest[key] if self.smallest.get(key) else 0.0

    @property
    def scope(self) -> str:
        return str(getattr(self.policy, "scope", "global"))


@dataclasses.dataclass
class Expected:
    """What one step comes to, in one process."""

    norms: dict[Key, float]
    scales: dict[Key, float]
    scale_atol: dict[Key, float]
    bad: set[Key]
    skipped: bool
    raised: bool
    total: float  # N of all groups together
    clipped_total: float


class Checker:
    def __init__(self, case: Case, ranks: list[dict[str, Any]]) -> None:
        self.case, self.ranks = case, ranks
        self.logical = case.model.logical()
        self.number = {name: number for number, name in enumerate(self.logical)}
        self.index: list[dict[str, np.ndarray]] = [rank["index"] for rank in ranks]
        held = {name for index in self.index for name in index}
        require(held == set(self.logical), "the test is to blame: tensors", sorted(held ^ set(self.logical)))
        self.check_cover()
        self.excluded = {n for n in self.logical if any(fnmatch.fnmatchcase(n, p) for p in case.exclude)}
        self.groups = [Group(pattern, policy, reference.rule_of(policy), []) for pattern, policy in case.rules]
        self.group_of: dict[str, Group] = {}
        for name in self.logical:
            if name not in self.excluded:
                group = next(g for g in self.groups if fnmatch.fnmatchcase(name, g.pattern))
                group.names.append(name)
                self.group_of[name] = group
        # Distinct pieces, empty ones left out.
        self.pieces: dict[tuple[str, int], Tensor] = {}
        self.piece_of: list[dict[str, tuple[str, int]]] = []
        numbers: dict[tuple[str, bytes], tuple[str, int]] = {}
        for index in self.index:
            mine = {}
            for name, elements in index.items():
                if elements.size:
                    key = numbers.setdefault((name, elements.tobytes()), (name, len(numbers)))
                    self.pieces[key] = torch.from_numpy(elements)
                    mine[name] = key
            self.piece_of.append(mine)
        self.t = 0  # steps that were not skipped
        self.before: list[Any] = [None] * len(ranks)

    def check_cover(self) -> None:
        """Pieces as the test believes them to be: every element is held, and pieces that differ do not overlap."""
        for name, tensor in self.logical.items():
            distinct = {index[name].tobytes(): index[name] for index in self.index if name in index}
            elements = np.sort(np.concatenate(list(distinct.values())))
            whole = np.arange(math.prod(tensor.shape))
            require(np.array_equal(elements, whole), "the test is to blame: pieces of", name)

    def run(self) -> None:
        for rank, result in enumerate(self.ranks):
            mine = [name for name in self.logical if name in self.index[rank] and name not in self.excluded]
            require(sorted(result["names"]) == sorted(mine), f"rank {rank}: names", result["names"])
        for step in range(1, len(self.case.steps) + 1):
            try:
                self.check_step(step)
            except Mismatch as error:
                raise Mismatch(f"step {step}: {error}") from None

    # ------------------------------------------------------------------------------------------------ expectations

    def whole_gradients(self, step: int) -> tuple[dict[str, Tensor], list[set[str]]]:
        """Whole gradients by name (without those that no rank has), and the names whose piece each rank lacks."""
        whole: dict[str, Tensor] = {}
        lacks: list[set[str]] = [set() for _ in self.ranks]
        for name, tensor in self.logical.items():
            number = self.number[name]
            grad = cases.gradient(self.case, number, tensor, step)
            without = cases.lacking(self.case.kind(number, tensor, step))
            if grad is None:
                continue
            if without is not None and name in self.index[without]:
                missing = self.index[without][name]
                for rank, index in enumerate(self.index):
                    if name in index and np.array_equal(index[name], missing):
                        lacks[rank].add(name)
                grad.view(-1)[torch.from_numpy(missing)] = 0
            if any(self.has_gradient(step, rank, name) for rank, i in enumerate(self.index) if name in i):
                whole[name] = grad
        return whole, lacks

    def has_gradient(self, step: int, rank: int, name: str) -> bool:
        return bool(self.ranks[rank]["steps"][step - 1]["present"][name])

    def expect(self, step: int, whole: dict[str, Tensor], lacks: list[set[str]]) -> Expected:
        grads: list[dict[Key, Tensor]] = []
        for group in self.groups:
            if not group.shards:
                grads.append({name: whole[name] for name in group.names if name in whole})
                continue
            there = {
                key for rank, mine in enumerate(self.piece_of) for name, key in mine.items() if name not in lacks[rank]
            }
            pieces = {key: index for key, index in self.pieces.items() if key[0] in group.names and key in there}
            grads.append({key: whole[key[0]].flatten()[i] for key, i in pieces.items() if key[0] in whole})
        norms = {key: reference.l2_norm(grad) for each in grads for key, grad in each.items()}
        bad = {key for key, norm in norms.items() if not math.isfinite(norm)}
        mode = self.case.nonfinite
        counted = {k: n for k, n in norms.items() if not (mode == "zero" and k in bad)}
        total = reference.total_norm(counted)
        raised = bool(bad) and mode == "raise"
        skipped = (bool(bad) and mode == "skip") or (self.case.skip_above is not None and total > self.case.skip_above)
        scales: dict[Key, float] = dict.fromkeys(norms, 1.0)
        atol: dict[Key, float] = dict.fromkeys(norms, SUBNORMAL)
        if not raised and not skipped:
            self.t += 1
            for group, mine in zip(self.groups, grads, strict=True):
                limits = self.moment_errors(group, {key: norms[key] for key in mine if key in counted})
                known = {key: group.rule.memory(key) for key in mine}
                outcome = reference.clip(group.rule, mine, mode)
                scales |= outcome.scales
                for key, scale in outcome.scales.items():
                    gamma = known[key].get("gamma", 0.0)
                    error = SUBNORMAL / gamma if gamma else 0.0
                    if isinstance(group.policy, dist_clip.LogClip):
                        # With a global clip after the rule, each scale has a part of the others' errors.
                        others = mine if group.policy.post_max_norm is not None else [key]
                        error = group.policy.power * max(map(group.level_error, others))
                    atol[key] += limits.get(key, 0.0) + (abs(scale) * error if math.isfinite(scale) else 0.0)
                for key in mine:
                    memory = group.rule.memory(key)
                    group.smallest[key] = min(group.smallest.get(key, math.inf), memory.get("level") or math.inf)
        clipped = math.sqrt(sum((scales[key] * norm) ** 2 for key, norm in counted.items()))
        return Expected(norms, scales, atol, bad, skipped, raised, total, clipped)

    def moment_errors(self, group: Group, counted: dict[Key, float]) -> dict[Key, float]:
        """How far ZClip's scales may be off, before its rule gets `counted`; nothing for other policies."""
        if not isinstance(group.policy, dist_clip.ZClip):
            return {}
        if group.scope == "global":
            error = group.errors.setdefault(None, MomentErrors()).follow(group.rule, reference.total_norm(counted))
            return dict.fromkeys(counted, error)
        return {
            key: group.errors.setdefault(key, MomentErrors()).follow(group.rule.rule(key), norm)
            for key, norm in counted.items()
        }

    # ------------------------------------------------------------------------------------------------------ checks

    def check_step(self, step: int) -> None:
        whole, lacks = self.whole_gradients(step)
        expected = self.expect(step, whole, lacks)
        for rank, result in enumerate(self.ranks):
            entry = result["steps"][step - 1]
            try:
                self.check_present(rank, entry, whole, lacks[rank])
                self.check_raised(rank, entry, expected)
                if "report" in entry:
                    self.check_report(rank, entry, expected)
                    self.check_log(rank, entry, step)
                self.check_gradients(rank, entry, whole, expected)
                self.check_state(rank, entry, expected)
            except Mismatch as error:
                raise Mismatch(f"rank {rank}: {error}") from None
        self.check_agreement(step)

    def check_present(self, rank: int, entry: dict[str, Any], whole: dict[str, Tensor], lacks: set[str]) -> None:
        """The test gave the gradients that it believes it gave. FSDP1 may have none where nothing is held."""
        for name, present in entry["present"].items():
            due = name in whole and name not in lacks
            unsure = self.index[rank][name].size == 0
            require(present == due or unsure, f"the test is to blame: gradient of {name}", present, due)

    def check_raised(self, rank: int, entry: dict[str, Any], expected: Expected) -> None:
        require(("raised" in entry) == expected.raised, "raised", entry.get("raised"), sorted(map(str, expected.bad)))
        if not expected.raised:
            return
        message = entry["raised"]
        require(message == self.ranks[0]["steps"][self.step_of(entry, rank)]["raised"], "messages differ", message)
        named = dict(re.findall(r"'([\w.]+)' \(rank ([\d, ]+)\)", message))
        names = sorted({key if isinstance(key, str) else key[0] for key in expected.bad})
        require(sorted(named) == names[:8], "the error names", sorted(named), "not", names)
        for name, listed in named.items():
            faulty = self.faulty_ranks(name, self.step_of(entry, rank) + 1)
            require([int(r) for r in listed.split(",")] == faulty, message, f"{name} is faulty on", faulty)

    def step_of(self, entry: dict[str, Any], rank: int) -> int:
        return next(i for i, other in enumerate(self.ranks[rank]["steps"]) if other is entry)

    def faulty_ranks(self, name: str, step: int) -> list[int]:
        """Ranks whose piece of that gradient has a NaN or Inf."""
        whole, lacks = self.whole_gradients(step)
        return [
            rank
            for rank, index in enumerate(self.index)
            if name in index
            and name not in lacks[rank]
            and not whole[name].flatten()[torch.from_numpy(index[name])].isfinite().all()
        ]

    def key(self, rank: int, name: str) -> Key | None:
        """What this rank's part of a tensor is to its policy; None: an empty shard, where shards are tensors."""
        return self.piece_of[rank].get(name) if self.group_of[name].shards else name

    def check_report(self, rank: int, entry: dict[str, Any], expected: Expected) -> None:
        report = entry["report"]
        require(list(report["names"]) == self.ranks[rank]["names"], "names in the report", report["names"])
        finite = True
        counted = clipped = 0
        for name, norm, scale in zip(report["names"], report["tensor_norms"], report["scales"], strict=True):
            key = self.key(rank, name)
            counted += norm != 0
            clipped += norm != 0 and scale < 1
            if key not in expected.norms:
                require(norm == 0, f"{name}: norm {norm} where there is no gradient")
                continue
            due = expected.norms[key]
            finite &= math.isfinite(due)
            require(close(norm, fp32(due)), f"{name}: norm {norm}, not {due}")
            if due != 0:  # of a gradient of zeros the scale does not matter
                want = expected.scales[key]
                good = close(scale, want, expected.scale_atol[key], self.scale_rtol(name))
                if not good:
                    raise Mismatch(f"{name}: scale {scale}, not {want}")
        require(close(report["clipped_fraction"], clipped / max(1, counted)), "clipped fraction")
        require(report["min_scale"] == min(report["scales"], default=1.0) or math.isnan(report["min_scale"]), "minimum")
        if self.case.nonfinite == "skip":
            require(report["nonfinite"] == bool(expected.bad), "nonfinite", report["nonfinite"])
        elif self.case.skip_above is None:
            require(report["nonfinite"] == (not finite), "nonfinite", report["nonfinite"])
        require(report["skip"] == expected.skipped, "skip", report["skip"])
        present = sum(entry["present"][name] for name in report["names"])
        require(report["num_grads"] == present, "num_grads", report["num_grads"], present)
        require(report["empty"] == (present == 0), "empty")
        self.check_global_norm(report, expected)

    def scale_rtol(self, name: str) -> float:
        return RTOL * max(1.0, getattr(self.group_of[name].policy, "power", 1.0))

    def check_global_norm(self, report: dict[str, Any], expected: Expected) -> None:
        norm, clipped = report["global_norm"], report["clipped_global_norm"]
        require(report["has_global_norm"] == (norm is not None), "has_global_norm")
        free = self.case.model.pp == 1 and not any(group.shards for group in self.groups)
        if self.case.log_global_norm or free:
            require(norm is not None and clipped is not None, "global norms are not reported", norm, clipped)
        if norm is not None:
            require(close(norm, fp32(expected.total)), f"global norm {norm}, not {expected.total}")
        if clipped is not None:
            # Its tensors' scales and norms have their errors.
            rtol = 2 * max(map(self.scale_rtol, self.group_of), default=RTOL)
            atol = SUBNORMAL + max(
                (expected.scale_atol[k] * n for k, n in expected.norms.items() if math.isfinite(n)), default=0.0
            )
            due = fp32(expected.clipped_total)
            require(close(clipped, due, atol, rtol), f"clipped global norm {clipped}, not {due}")

    def check_log(self, rank: int, entry: dict[str, Any], step: int) -> None:
        """Collectives: none across stages once the warm-ups are over, none at all where nothing is split."""
        log = [(name, ranks) for name, ranks in entry.get("log", ()) if len(ranks) > 1]
        warm = all(
            group.scope != "global"
            and group.policy.post_max_norm is None
            and (isinstance(group.policy, dist_clip.ZClip) or self.t > group.policy.warmup_steps)
            for group in self.groups
        )
        case = self.case
        silent = warm and case.nonfinite in ("propagate", "zero") and not case.log_global_norm
        if not silent or case.skip_above is not None or any(step_.reload for step_ in case.steps[: step - 1]):
            return
        if step & (step - 1) == 0:  # replicas are compared
            return
        if isinstance(case.model, Hand) and case.model.pp > 1:
            per = case.world // case.model.pp
            across = [call for call in log if len({r // per for r in call[1]}) > 1]
            require(not across, "collectives across stages", across)
        if all(tensor.mesh is None for tensor in self.logical.values()) and isinstance(case.model, Hand):
            require(not log, "collectives, though no tensor is split", log)

    def check_gradients(self, rank: int, entry: dict[str, Any], whole: dict[str, Tensor], expected: Expected) -> None:
        for name, after in entry["after"].items():
            if not entry["present"][name]:
                require(after is None, f"{name}: a gradient where there was none")
                continue
            mine = self.index[rank][name]
            require(after is not None and after.size == mine.size, f"{name}: gradient", after)
            if not mine.size or (name in self.excluded and any(self.logical[name].partial)):
                continue  # nobody has made the sum of a gradient that is excluded
            before = whole[name].flatten()[torch.from_numpy(mine)].double().numpy()
            key = self.key(rank, name) if name in self.group_of else None
            if key is None or expected.raised or expected.skipped:
                if not same(after, before):
                    raise Mismatch(f"{name}: changed from {before} to {after}")
                continue
            if self.case.nonfinite == "zero" and key in expected.bad:
                if after.any():
                    raise Mismatch(f"{name}: not zero but {after}")
                continue
            scale = expected.scales[key]
            reported = entry["report"]["scales"][self.ranks[rank]["names"].index(name)]
            if scale == 1.0 == reported:
                if not same(after, before):
                    raise Mismatch(f"{name}: scale 1, but changed from {before} to {after}")
                continue
            self.check_scaled(name, before, after, scale, expected.scale_atol[key])

    def check_scaled(self, name: str, before: np.ndarray, after: np.ndarray, scale: float, atol: float) -> None:
        dtype = self.logical[name].dtype
        with np.errstate(all="ignore"):
            # Below float64, gradients are multiplied by the scale as a float32.
            product = before * (scale if dtype == "float64" else fp32(scale))
            want = torch.from_numpy(product).to(getattr(torch, dtype)).double().numpy()
            error = np.abs(after - want)
            limit = (
                np.abs(want) * (self.scale_rtol(name) + ROUNDING[dtype]) + np.abs(before) * atol + 2 * SPACING[dtype]
            )
            good = (error <= limit) | (np.isnan(want) & np.isnan(after)) | (want == after)
        if not good.all():
            raise Mismatch(f"{name}: scaled by {scale} from {before[~good]} to {after[~good]}, not {want[~good]}")

    def check_state(self, rank: int, entry: dict[str, Any], expected: Expected) -> None:
        state = entry["state"]
        require(state["t"] == self.t, "steps", state["t"], self.t)
        check_finite(state)
        if expected.raised or expected.skipped:
            previous = self.before[rank]
            require(previous is None or repr(previous) == repr(state), "a skipped step changed the state")
        self.before[rank] = state
        for group in self.groups:
            if group.scope == "global":
                self.check_memory(group, None, state["global"].get(group.pattern, {}), group.pattern)
                continue
            for name in group.names:
                if name in self.index[rank]:
                    self.check_memory(group, self.key(rank, name), state["tensors"][name], name)

    def check_memory(self, group: Group, key: Key | None, slots: dict[str, Any], where: str) -> None:
        for slot, due in group.rule.memory(key).items():
            rtol, atol = RTOL, SUBNORMAL
            if slot == "level":
                keys = group.smallest if key is None else [key]
                rtol += max(map(group.level_error, keys), default=0.0)
            elif slot in ("mean", "var"):
                # Both are float64 and have the errors of the norms in them, and float64's of the largest that ever were.
                errors = group.errors.get(key, MomentErrors())
                rtol = 1e-13
                atol = errors.mean if slot == "mean" else errors.var + 1e-13 * errors.largest**2
            require(close(slots[slot], due, atol, rtol), f"{slot} of {where}: {slots[slot]}, not {due}")

    def check_agreement(self, step: int) -> None:
        """Ranks that hold the same tensor (scope "shard": piece) agree on its norm, scale and state to the bit."""
        seen: dict[Any, tuple[int, str]] = {}
        for rank, result in enumerate(self.ranks):
            entry = result["steps"][step - 1]
            state = entry["state"]
            facts: dict[Any, Any] = {("global", p): slots for p, slots in state["global"].items()}
            report = entry.get("report")
            for i, name in enumerate(result["names"]):
                key = self.key(rank, name)
                if key is not None:
                    numbers = (report["tensor_norms"][i], report["scales"][i]) if report else ()
                    facts[key] = (*numbers, state["tensors"].get(name))
            if report and report["global_norm"] is not None:
                facts["global norm"] = report["global_norm"]
            for key, mine in facts.items():
                first, theirs = seen.setdefault(key, (rank, repr(mine)))
                require(theirs == repr(mine), f"{key}: {theirs} on rank {first}, {mine!r} on rank {rank}")
        logs: dict[tuple[int, ...], tuple[int, list[str]]] = {}
        for rank, result in enumerate(self.ranks):
            mine_log: dict[tuple[int, ...], list[str]] = {}
            for name, ranks in result["steps"][step - 1].get("log", ()):
                mine_log.setdefault(ranks, []).append(name)
            for ranks, names in mine_log.items():
                first, others = logs.setdefault(ranks, (rank, names))
                require(names == others, f"collectives over {ranks}: {others} on rank {first}, {names} on rank {rank}")


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))


def check_finite(state: dict[str, Any]) -> None:
    """Nothing that is not finite ever enters the state; rows of a record that hold nothing yet may be anything."""
    for part in ("tensors", "global"):
        for name, slots in state[part].items():
            for slot, value in slots.items():
                if not isinstance(value, list):
                    require(math.isfinite(value) and value >= 0, f"state of {name}: {slot} = {value}")
