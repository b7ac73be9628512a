"""Run an unmodified Megatron script with the clipping flags added: ``python -m dist_clip.megatron SCRIPT ARGS...``.

The flags are taken off the command line before the script sees it, so that its own parser need not know them. Where the
script uses Megatron-LM's parser (megatron.training), they are added there, too, with the given values as defaults: they
show in ``--help`` and in the log of arguments, and go into checkpoints with the others. The optimizer is caught where it is
made, before any checkpoint is loaded, so that the clipping state is restored with it.

Nothing of Megatron is imported before the script imports it: what is to be changed is changed as its module comes in.
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

from dist_clip.megatron.flags import add_clip_args, attach_from_args, policy_from_args
from dist_clip.policies import modes

# Where optimizers are made: scripts import from the first, Megatron-LM's loop has the name in the last.
_MAKERS = ("get_megatron_optimizer", "get_megatron_muon_optimizer")
_MAKER_MODULES = ("megatron.core.optimizer", "megatron.core.optimizer.muon", "megatron.training.training")
_PARSER_MODULE = "megatron.training.arguments"
_PARSER_FUNCTION = "add_megatron_arguments"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script named on the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(argv))
        raise SystemExit(0 if argv else 2)
    script, rest = argv[0], argv[1:]
    if not Path(script).is_file():
        raise SystemExit(f"dist_clip.megatron: no script {script!r}")
    sys.path.insert(0, str(Path(script).resolve().parent))
    # No prefixes: --zclip could be the beginning of a flag of the script's own.
    parser = argparse.ArgumentParser(prog="dist_clip.megatron", add_help=False, allow_abbrev=False)
    try:
        ours, theirs = add_clip_args(parser, rest).parse_known_args(rest)
        policy_from_args(ours, 1.0)  # what contradicts itself is better known now than when the model is built
    except (ImportError, ValueError) as error:
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


class OptimizerCatcher(importlib.abc.MetaPathFinder):
    """Attaches every optimizer that Megatron makes from now on, as the flags say."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.caught: list[Any] = []
        self._depth = 0
        self._finding: set[str] = set()

    def install(self) -> None:
        """Change Megatron's modules: those that are imported already, and the others as they come in."""
        for name in (*_MAKER_MODULES, _PARSER_MODULE):
            if name in sys.modules:
                self.change(sys.modules[name])
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own specification, with its loader made to change the module once it has run."""
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
            # A maker may call another one (Muon makes its Adam so): only the whole is attached.
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
