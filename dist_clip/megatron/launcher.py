"""Runs an unmodified Megatron script with the clipping flags added: ``python -m dist_clip.megatron SCRIPT ARGS...``.

The launcher removes its flags from the command line before the script reads it, so that the script's parser need not
know them. If the script uses Megatron-LM's parser (megatron.training), they are added there as well, with the given
values as defaults: they then show in ``--help`` and in the log of arguments, and are saved in checkpoints with the
others. The optimizer is caught where it is made, before any checkpoint is loaded, so that the clipping state is
restored with it.

The launcher imports nothing of Megatron before the script does: it changes Megatron's modules when they are imported.
"""

from __future__ import annotations

import argparse
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dist_clip.guards import Guard
from dist_clip.megatron.flags import add_clip_args, attach_from_args, guards_from_args, policy_from_args
from dist_clip.policies import modes

# Modules with the functions that make optimizers: scripts import them from the first, and Megatron-LM's loop uses the
# name in the last.
_MAKERS = ("get_megatron_optimizer", "get_megatron_muon_optimizer")
_MAKER_MODULES = ("megatron.core.optimizer", "megatron.core.optimizer.muon", "megatron.training.training")
_PARSER_MODULE = "megatron.training.arguments"
_PARSER_FUNCTION = "add_megatron_arguments"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script that the command line names.

    Args:
        argv: the script, its arguments and the clipping flags. None: those of this process.

    Raises:
        SystemExit: no script, contradicting flags, or no optimizer was made; also for ``--help``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(argv))
        raise SystemExit(0 if argv else 2)
    script, rest = argv[0], argv[1:]
    if not Path(script).is_file():
        raise SystemExit(f"dist_clip.megatron: no script {script!r}")
    sys.path.insert(0, str(Path(script).resolve().parent))
    # Without abbreviations, because --zclip may be a flag of the script, and not a prefix of ours.
    parser = argparse.ArgumentParser(prog="dist_clip.megatron", add_help=False, allow_abbrev=False)
    try:
        ours, theirs = add_clip_args(parser, rest).parse_known_args(rest)
        policy_from_args(ours, 1.0)  # raises for contradicting flags now, before the model is built
        _refuse_loss(guards_from_args(ours))
    except (ImportError, TypeError, ValueError) as error:
        raise SystemExit(f"dist_clip.megatron: {error}") from None
    catcher = OptimizerCatcher(ours)
    catcher.install()
    sys.argv = [script, *theirs]
    runpy.run_path(script, run_name="__main__")
    if ours.grad_clip_mode is not None and not catcher.caught:
        raise SystemExit(
            f"dist_clip.megatron: {script} made no optimizer by {' or '.join(_MAKERS)}, so nothing was clipped by "
            f"--grad-clip-mode {ours.grad_clip_mode}"
        )


def _refuse_loss(guards: Sequence[Guard]) -> None:
    """Raise ValueError for a guard that looks at the loss, which Megatron's loop does not hand to the optimizer."""
    for guard in guards:
        if "loss" in guard.needs():
            raise ValueError(
                f"{type(guard).__name__} looks at the loss, which Megatron's loop does not hand to the optimizer: let it "
                "look at the norm alone (--no-skipstep-loss), or attach in your script and call "
                "clipper.observe_loss(loss) in the loss function"
            )


class OptimizerCatcher(importlib.abc.MetaPathFinder):
    """Attaches a clipper, as the flags describe it, to every optimizer that Megatron makes after `install`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.caught: list[Any] = []
        self._depth = 0
        self._finding: set[str] = set()

    def install(self) -> None:
        """Change Megatron's modules: those that are imported already now, and the others when they are imported."""
        for name in (*_MAKER_MODULES, _PARSER_MODULE):
            if name in sys.modules:
                self.change(sys.modules[name])
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own specification, whose loader now changes the module after running it."""
        if fullname not in (*_MAKER_MODULES, _PARSER_MODULE) or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            self.change(module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec

    def change(self, module: ModuleType) -> None:
        if module.__name__ == _PARSER_MODULE:
            if hasattr(module, _PARSER_FUNCTION):
                setattr(module, _PARSER_FUNCTION, self._with_flags(getattr(module, _PARSER_FUNCTION)))
            return
        for name in _MAKERS:
            make = getattr(module, name, None)
            if make is not None and not hasattr(make, "__dist_clip__"):
                setattr(module, name, self._catching(make))

    def _catching(self, make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(config: Any, model_chunks: Any, *rest: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                optimizer = make(config, model_chunks, *rest, **kwargs)
            finally:
                self._depth -= 1
            # One maker may call another (Muon's makes its Adam that way); only the outermost optimizer is attached.
            if self._depth == 0 and self.args.grad_clip_mode is not None:
                attach_from_args(
                    optimizer,
                    self.args,
                    model=model_chunks,
                    clip_grad=config.clip_grad,
                    pg_collection=kwargs.get("pg_collection"),
                )
                self.caught.append(optimizer)
            return optimizer

        made.__dist_clip__ = True  # type: ignore[attr-defined]
        return made

    def _with_flags(self, add_arguments: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(add_arguments)
        def added(parser: argparse.ArgumentParser, *rest: Any, **kwargs: Any) -> Any:
            parser = add_arguments(parser, *rest, **kwargs)
            add_clip_args(parser)
            parser.set_defaults(**vars(self.args))
            return parser

        return added


def _help(argv: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(
        prog="python -m dist_clip.megatron",
        description="Run an unmodified Megatron script with dist_clip's clipping. All other arguments go to the script.",
        add_help=False,
    )
    add_clip_args(parser, argv)
    parser.usage = f"{parser.prog} SCRIPT [its arguments] [--grad-clip-mode {{{','.join(modes())}}} ...]"
    return parser.format_help()
