"""How many collectives a clip step needs, how large they are, and how long they would take, from 8 to 65,536 ranks.

    python -m scripts.simulate                 # the whole sweep, minutes on one core
    python -m scripts.simulate --quick         # a few cells, under a minute

Real clippers take real steps on ranks of torch's fake process group: what they send is counted. How long that takes is
modelled. docs/simulation.md says which is which.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import tyro

from scripts.simulation.layouts import EP, FAMILIES, Family
from scripts.simulation.network import DEFAULT, Network
from scripts.simulation.output import Entry, Results, TensorEntry, paste, plot, tables, write_json
from scripts.simulation.rows import simulate
from scripts.simulation.shapes import MODELS, stack


@dataclasses.dataclass(frozen=True)
class Config:
    """What is simulated, and where the results go."""

    quick: bool = False
    """A few layouts, rank counts and tensor counts only, and only the first rank of each."""
    out: Path = Path("runs/simulate")
    """Folder for simulate.json, tables.md and the plots."""
    network: Path = DEFAULT
    """Parameters of the network and of the pipeline."""
    ranks: tuple[int, ...] = (8, 32, 128, 512, 2048, 8192, 32768, 65536)
    """Rank counts, powers of 2."""
    tensors: tuple[int, ...] = (10, 100, 1000, 10000)
    """Tensors a pipeline stage, of the sweep over tensors."""
    tensor_ranks: int = 64
    """Ranks of the sweep over tensors."""
    docs: Path | None = None
    """A page with markers, between which the tables are pasted."""


QUICK = ("FSDP", "PP + TP + FSDP", "PP + TP + EP + HSDP")
SLOW_FOR_TORCH = 1000
"""torch's GlobalGC is not run on more tensors than this: stacking thousands of DTensors takes it a minute."""


def sweep_ranks(cfg: Config, network: Network) -> Iterator[Entry]:
    wanted = (cfg.ranks[0], 512, cfg.ranks[-1]) if cfg.quick else cfg.ranks
    for family in chosen(cfg):
        for ranks in wanted:
            if ranks < family.smallest:
                continue
            degrees = family.degrees(ranks)
            started = time.monotonic()
            cell = simulate(MODELS[family.model], degrees, network, positions=(0,) if cfg.quick else None)
            entry = Entry(family.name, family.model, ranks, str(degrees), degrees.pp, cell)
            row = entry.row("dist_clip AdaGC")
            print(
                f"{family.model:>14} {ranks:>6} ranks, {degrees}: AdaGC {row.collectives} collectives, "
                f"{row.exposed_us:.0f} us modelled, alike on ranks {cell.positions}: {cell.alike} "
                f"({time.monotonic() - started:.1f} s)",
                flush=True,
            )
            yield entry


def sweep_tensors(cfg: Config, network: Network) -> Iterator[TensorEntry]:
    wanted = (cfg.tensors[0], cfg.tensors[-1]) if cfg.quick else cfg.tensors
    kinds = {family.name: family for family in chosen(cfg)}  # the models play no part here
    for family in kinds.values():
        if cfg.quick and family.name != "PP + TP + FSDP":
            continue
        degrees = family.degrees(cfg.tensor_ranks)
        for tensors in wanted:
            started = time.monotonic()
            model = stack(tensors, stages=degrees.pp, experts=64 if EP in family.caps else 0)
            torch_too = tensors <= SLOW_FOR_TORCH
            cell = simulate(model, degrees, network, positions=(0,), policies=("AdaGC",), torch_too=torch_too)
            print(f"{tensors:>6} tensors, {degrees} ({time.monotonic() - started:.1f} s)", flush=True)
            yield TensorEntry(family.name, cfg.tensor_ranks, tensors, cell)


def chosen(cfg: Config) -> list[Family]:
    return [family for family in FAMILIES if not cfg.quick or family.name in QUICK]


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__)
    # DTensor warns that torch's GlobalGC takes several collectives: they are what is counted here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    started = time.monotonic()
    network = Network.load(cfg.network)
    results = Results(list(sweep_ranks(cfg, network)), list(sweep_tensors(cfg, network)), network)
    cfg.out.mkdir(parents=True, exist_ok=True)
    text = tables(results)
    write_json(results, cfg.out / "simulate.json")
    (cfg.out / "tables.md").write_text(text + "\n")
    images = plot(results, cfg.out)
    if cfg.docs is not None:
        paste(text, cfg.docs)
    print(f"\n{text}\n\n{cfg.out}: simulate.json, tables.md, {', '.join(image.name for image in images)}")
    print(f"simulated in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
