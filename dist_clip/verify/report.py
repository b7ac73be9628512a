"""The report of a verification, the same on every rank."""

from __future__ import annotations

import dataclasses

from dist_clip.errors import VerifyError


@dataclasses.dataclass(frozen=True)
class VerifiedNorm:
    """A norm that the clipper finds, beside the norm that was measured on the whole gradient.

    Attributes:
        name: FQN of the tensor, or "(global norm)".
        shape: shape of the whole tensor; () for the global norm.
        copies: (ranks, norm) of the tensor's copies; those with one norm are one entry.
        num_copies: number of copies.
        found: the norm that the clipper finds; where ranks find different norms, that which is furthest off.
        measured: the measured norm; where copies differ, that of the copy nearest to `found`.
        difference: relative difference of `found` from `measured`; inf where only one of them is 0 or not finite.
        problems: what is wrong, one sentence each; empty if nothing is.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0))
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> row = clipper.verify().tensors[0]
        >>> row.name, row.measured, row.problems
        ('weight', 2.0, ())
    """

    name: str
    shape: tuple[int, ...]
    copies: tuple[tuple[tuple[int, ...], float], ...]
    num_copies: int
    found: float
    measured: float
    difference: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What ``GradClipper.verify`` found, the same on every rank. ``print(report)`` shows the table.

    Attributes:
        tensors: one row a logical tensor, of all pipeline stages.
        global_norm: the row of the global norm of all tensors together.
        tolerance: the relative difference up to which norms count as the same.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0))
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> report = clipper.verify()
        >>> print(report)
        tensor         shape  copies  clipper's norm  measured    difference  result
        -------------  -----  ------  --------------  ----------  ----------  ------
        weight         2x2    1       2.00000000      2.00000000  0.0e+00     ok
        bias           2      1       1.41421354      1.41421356  1.7e-08     ok
        (global norm)         1       2.44948983      2.44948974  3.6e-08     ok
        verify: all 2 tensors and the global norm are right to 1e-05
        >>> status = 0 if report.ok else 1  # for sys.exit(status)
    """

    tensors: tuple[VerifiedNorm, ...]
    global_norm: VerifiedNorm
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.mismatches

    @property
    def mismatches(self) -> tuple[VerifiedNorm, ...]:
        """The rows of what differs."""
        return tuple(row for row in (*self.tensors, self.global_norm) if not row.ok)

    def raise_if_wrong(self) -> None:
        """Raise if anything differs.

        Raises:
            VerifyError: with what differs in its message.
        """
        if not self.ok:
            raise VerifyError("; ".join(self._sentences()))

    def _sentences(self) -> list[str]:
        wrong = sum(not row.ok for row in self.tensors)
        first = f"verify: {wrong} of {len(self.tensors)} tensors differ"
        if not self.global_norm.ok:
            first += ", and the global norm" if wrong else ", but the global norm does"
        return [first, *(f"{row.name}: {problem}" for row in self.mismatches for problem in row.problems)]

    def __str__(self) -> str:
        """Return the table, mismatches first, followed by what is wrong with each."""
        rows = [("tensor", "shape", "copies", "clipper's norm", "measured", "difference", "result")]
        for row in sorted((*self.tensors, self.global_norm), key=lambda row: row.ok):
            is_tensor = row is not self.global_norm
            rows.append(
                (
                    row.name,
                    ("x".join(map(str, row.shape)) or "scalar") if is_tensor else "",
                    str(row.num_copies),
                    f"{row.found:.9g}" if not 1e-3 <= row.found < 1e6 else f"{row.found:.8f}",
                    f"{row.measured:.9g}" if not 1e-3 <= row.measured < 1e6 else f"{row.measured:.8f}",
                    f"{row.difference:.1e}",
                    "ok" if row.ok else "DIFFERS",
                )
            )
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        if self.ok:
            count = len(self.tensors)
            lines.append(f"verify: all {count} tensors and the global norm are right to {self.tolerance:g}")
        else:
            lines += self._sentences()
        return "\n".join(lines)


def ranks_label(ranks: tuple[int, ...]) -> str:
    """Return "rank 3" or "ranks 0-2,5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) != 1 else ''} {text}"
