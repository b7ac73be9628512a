"""The command line, by tyro: one function a subcommand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, default those of the command line. Exits with 1, and one line, on errors."""
    try:
        import tyro
    except ImportError:
        raise SystemExit('dist-clip needs tyro: pip install "dist-clip[cli]"') from None
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"report": report, "compare": compare, "explain": explain, "doctor": doctor, "verify": verify},
            prog="dist-clip",
            description="Looks at runs, and at what dist_clip is told to do.",
            args=arguments,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"dist-clip: {error}") from error


def report(run: Path, out: Path | None = None) -> None:
    """Write one self-contained HTML page about a run.

    Args:
        run: the run's log of JSON lines, or the folder with its log.jsonl.
        out: the page. Default: report.html beside the log.
    """
    from dist_clip.command.page import render
    from dist_clip.monitor import read_run

    page = render(read_run(run), run.resolve().name if run.is_dir() else run.stem)
    out = (run if run.is_dir() else run.parent) / "report.html" if out is None else out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(f"report: {out}")


def compare(runs: tuple[Path, ...]) -> None:
    """Print a table of several runs: loss, clipping, skips, and spikes with their worst culprit.

    Args:
        runs: logs of JSON lines, or folders with a log.jsonl.
    """
    from dist_clip.command.compare import table_of_runs

    print(table_of_runs(runs))


def explain(config: tuple[str, ...]) -> None:
    """Say what policies and guards do, and list their options.

    Args:
        config: each a name ("logclip"), a name with options ("logclip ratio=3"), JSON, a file of JSON, the log of a run, or
            "recommended", the library's own setting.
    """
    from dist_clip.command.explain import explain as explained

    print("\n\n".join(explained(each) for each in config or ("recommended",)))


def doctor() -> None:
    """Say which versions, backends and kernels are here, and try a clip on each device. Exits with 1 if one is wrong."""
    from dist_clip.command.doctor import diagnose

    text, healthy = diagnose()
    print(text)
    if not healthy:
        raise SystemExit(1)


def verify(ranks: int = 2) -> None:
    """Train a step of a small model under FSDP2 on this machine, and compare its clipper's norms with whole gradients'.

    Exits with 1 if one is wrong. `clipper.verify()` does the same with a model of your own.

    Args:
        ranks: how many processes. They use GPUs where there is one for each.
    """
    from dist_clip.command.verify import verify_here

    text, right = verify_here(ranks)
    print(text)
    if not right:
        raise SystemExit(1)
