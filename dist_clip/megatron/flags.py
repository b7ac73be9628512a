"""Command-line flags in Megatron's style, made from the policy registry, and the policy that they describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, get_args

from torch import nn

from dist_clip.clipper import GradClipper
from dist_clip.guards import Guard, registered_guards
from dist_clip.guards.command_line import guard_flags, guards_from_flags
from dist_clip.megatron.attach import MegatronAttachment, attach
from dist_clip.megatron.layer_norms import log_layer_grad_norms
from dist_clip.policies import Policy, modes, options_of, parse_mode, policy
from dist_clip.policies.command_line import COMMON, flag_names, import_modules, options_from_flags, policy_flags
from dist_clip.recommended import NAME as RECOMMENDED
from dist_clip.recommended import recommended
from dist_clip.step import NonFinite

_NOT_OF_A_POLICY = (
    "grad_clip_guard",
    "grad_clip_nonfinite",
    "grad_clip_exclude",
    "no_grad_clip_log_norm",
    "grad_clip_detect_desync",
    "grad_clip_verify",
    "log_layer_grad_norms",
)


def add_clip_args(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Add the clipping flags to a parser. Usable as Megatron-LM's ``extra_args_provider``.

    Each registered policy adds ``--NAME-OPTION`` for each of its hyper-parameters but ``max_norm``, which is Megatron's
    ``--clip-grad``. ``--grad-clip-module MODULE`` is read and imported first, so that the policies that the module
    registers get flags as well.

    Args:
        parser: gets the flags in their own argument group.
        arguments: the command line; default ``sys.argv[1:]``.

    Returns:
        The parser.

    Raises:
        ImportError: a module cannot be imported; the message names it.

    Example:
        >>> import argparse
        >>> parser = add_clip_args(argparse.ArgumentParser())
        >>> args = parser.parse_args(["--grad-clip-mode", "logclip", "--logclip-ratio", "3"])
        >>> policy_from_args(args, clip_grad=1.0).ratio
        3.0
    """
    import_modules("--grad-clip-module", sys.argv[1:] if arguments is None else arguments)
    group = parser.add_argument_group(
        "gradient clipping (dist_clip)", "In place of Megatron's own; --clip-grad stays the threshold of the warm-up."
    )

    def add(flag: str, **kwargs: Any) -> None:
        # Flags have no defaults, so that the policy's own default holds for those that were not given.
        group.add_argument(flag, default=None, **kwargs)

    add(
        "--grad-clip-mode",
        choices=(RECOMMENDED, *modes()),
        help=f"The rule; {RECOMMENDED}: what docs/recommended.md supports, a guard included. Not given: Megatron's own "
        "clipping, untouched.",
    )
    add(
        "--grad-clip-module",
        action="append",
        metavar="MODULE",
        help="A module that registers policies of your own, imported before the flags are made. May be repeated.",
    )
    add(
        "--grad-clip-guard",
        nargs="+",
        choices=tuple(registered_guards()),
        help="What decides whether a step is taken at all. Several: any may skip it.",
    )
    for flag in (*policy_flags(), *guard_flags()):
        option = flag.option
        kind: dict[str, Any] = {"type": option.type, "choices": option.choices or None}
        if option.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        add(flag_names([flag.dest]), help=f"{option.help} ({flag.hint})".replace("%", "%%"), **kind)
    add("--grad-clip-nonfinite", choices=get_args(NonFinite), help="What a NaN or Inf in a gradient leads to.")
    add(
        "--grad-clip-exclude",
        nargs="+",
        metavar="PATTERN",
        help="Global names of tensors to leave alone, as fnmatch patterns.",
    )
    add(
        "--no-grad-clip-log-norm",
        action="store_const",
        const=True,
        help="Do not find the global norm on steps that need it for the log alone.",
    )
    add(
        "--grad-clip-detect-desync",
        action="store_const",
        const=True,
        help="Stop when ranks have clipped differently often, or remember different norms. No collective more.",
    )
    add(
        "--grad-clip-verify",
        action="store_const",
        const=True,
        help="At the first step, compare all norms with those of the whole gradients, print the table on rank 0, and stop "
        "on all ranks if anything differs.",
    )
    add(
        "--log-layer-grad-norms",
        type=int,
        metavar="K",
        help="At every K-th iteration, write the norm of each layer's gradients with Megatron's writers, TensorBoard and "
        "Weights & Biases. No host sync.",
    )
    return parser


def policy_from_args(args: argparse.Namespace, clip_grad: float) -> Policy | None:
    """Return the policy of ``--grad-clip-mode``; None if the flag was not given.

    Args:
        args: parsed arguments, with the flags of `add_clip_args`.
        clip_grad: Megatron's ``--clip-grad``, which becomes the policy's ``max_norm``: the threshold of GlobalNorm and
            of the warm-up of AdaGC and LogClip, and the upper bound of ZClip's norm (0 or less: no bound).

    Raises:
        ValueError: flags that contradict each other, or values out of range; the message names them.

    Example:
        >>> import argparse
        >>> parser = add_clip_args(argparse.ArgumentParser())
        >>> policy_from_args(parser.parse_args(["--grad-clip-mode", "global"]), clip_grad=0.5)
        GlobalNorm(max_norm=0.5)
    """
    mode = getattr(args, "grad_clip_mode", None)
    if mode is None:
        ours = (*(flag.dest for flag in (*policy_flags(), *guard_flags())), *_NOT_OF_A_POLICY)
        stray = sorted(dest for dest in ours if getattr(args, dest, None) is not None)
        if stray:
            known = ", ".join((RECOMMENDED, *modes()))
            raise ValueError(f"{flag_names(stray)} without --grad-clip-mode: give it one of {known}")
        return None
    if mode == RECOMMENDED:
        options_from_flags(None, vars(args), f"--grad-clip-mode {mode}")  # raises for any policy's flag
        if not clip_grad > 0:
            raise ValueError(f"--grad-clip-mode {mode} clips at --clip-grad, which must be above 0, got {clip_grad}")
        chosen: Policy = recommended(clip_grad)["policy"]
        return chosen
    rule, _ = parse_mode(mode)
    options = options_from_flags(rule, vars(args), f"--grad-clip-mode {mode}")
    for option in options_of(rule):
        if option.name == COMMON:
            if not clip_grad > 0 and not option.optional:
                raise ValueError(
                    f"--grad-clip-mode {mode} clips at --clip-grad, which must be above 0, got {clip_grad}"
                )
            options[COMMON] = clip_grad if clip_grad > 0 else None
    return policy(mode, **options)


def guards_from_args(args: argparse.Namespace) -> list[Guard]:
    """Return the guards of ``--grad-clip-guard``; without the flag none, or the recommended one in that mode.

    Args:
        args: parsed arguments, with the flags of `add_clip_args`.

    Raises:
        TypeError, ValueError: flags that contradict each other, or values out of range; the message names them.

    Example:
        >>> import argparse
        >>> parser = add_clip_args(argparse.ArgumentParser())
        >>> arguments = ["--grad-clip-mode", "logclip", "--grad-clip-guard", "skipabove", "--skipabove-max-norm", "10"]
        >>> guards_from_args(parser.parse_args(arguments))
        [SkipAbove(max_norm=10.0, max_skips_in_a_row=None, when_stuck='step')]
    """
    names = getattr(args, "grad_clip_guard", None) or ()
    guards = guards_from_flags(names, vars(args), "--grad-clip-guard")
    return guards if names or args.grad_clip_mode != RECOMMENDED else [recommended()["guard"]]


def attach_from_args(
    optimizer: Any,
    args: argparse.Namespace,
    *,
    model: nn.Module | Sequence[nn.Module],
    clip_grad: float | None = None,
    pg_collection: Any = None,
) -> GradClipper | None:
    """Attach a clipper to a Megatron optimizer as the flags describe it.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned.
        args: parsed arguments, with the flags of `add_clip_args`.
        model: the model chunk, or the list of chunks, that the optimizer was made from.
        clip_grad: the policy's ``max_norm``, as for `policy_from_args`. None: ``args.clip_grad``, or 1.0 without it.
        pg_collection: as for `attach`.

    Returns:
        The clipper, as `attach` returns it. Without ``--grad-clip-mode`` None, and nothing is changed.

    Raises:
        ValueError: as `policy_from_args` documents.
        LayoutError, TypeError, RuntimeError, ImportError: as `attach` documents.

    Example (needs Megatron-core)::

        args = dist_clip.megatron.add_clip_args(parser).parse_args()
        optimizer = get_megatron_optimizer(optimizer_config, model_chunks)
        clipper = dist_clip.megatron.attach_from_args(optimizer, args, model=model_chunks)
    """
    threshold = getattr(args, "clip_grad", None) if clip_grad is None else clip_grad
    chosen = policy_from_args(args, 1.0 if threshold is None else float(threshold))
    if chosen is None:
        return None
    clipper = attach(
        optimizer,
        chosen,
        model=model,
        nonfinite=args.grad_clip_nonfinite or "propagate",
        guard=guards_from_args(args) or None,
        exclude=args.grad_clip_exclude or (),
        log_global_norm=not args.no_grad_clip_log_norm,
        detect_desync=bool(args.grad_clip_detect_desync),
        pg_collection=pg_collection,
    )
    if args.grad_clip_verify:
        assert isinstance(clipper.attachment, MegatronAttachment)
        clipper.attachment.verify_next()
    if args.log_layer_grad_norms is not None:
        log_layer_grad_norms(clipper, args.log_layer_grad_norms)
    return clipper
