"""The rules for which there is a kernel, and how it is told of them."""

from __future__ import annotations

from collections.abc import Sequence

GLOBAL_NORM, ADAGC, LOGCLIP, ZCLIP = 0, 1, 2, 3
"""What each needs beside norms, in this order:

    rule         state                                            parameters
    GLOBAL_NORM  none                                             max_norm
    ADAGC        gamma fp32                                       lambda_rel, beta, eps
    LOGCLIP      level fp32, count int32, streak int32            ratio, power, rate, patience
    ZCLIP        mean float64, var float64, count int64           alpha, z_thresh, warmup_steps, percentile, to_mean,
                                                                  clip_factor, max_norm or -1, skip_update_on_spike, eps
"""

_MOST_PARAMETERS = 9


def constants(
    rule: int,
    parameters: Sequence[float],
    *,
    one: bool,
    post_max_norm: float | None,
    skips: bool,
    first: bool,
    last: bool,
) -> dict[str, float]:
    """Return the constants of the kernel `decide` for one policy group, which stay the same at every step.

    Args:
        rule, parameters: as above.
        one: whether the rule sees one element, the global norm.
        post_max_norm: clip the result at this global norm; None: do not.
        skips: whether a step can be skipped.
        first, last: whether the group is the first, and the last one, of a step.
    """
    padded = [*parameters, *[0.0] * (_MOST_PARAMETERS - len(parameters))]
    known = {"RULE": rule, "ONE": one, "POST": post_max_norm or 0.0, "SKIPS": skips, "FIRST": first, "LAST": last}
    return known | {f"P{i}": value for i, value in enumerate(padded)}
