"""The data: real text as bytes, and batches that depend on the seed and the step alone, never on the layout."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

VALIDATION_SHARE = 10  # one file in ten, by the hash of its path


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    data: Path | None = None
    """A text file, or a folder (all its files but hidden ones). Default: the corpus."""
    corpus: Literal["stdlib", "torch-headers"] = "stdlib"
    """stdlib: this interpreter's own top-level standard-library *.py. torch-headers: the C++ headers that torch is
    installed with, of c10 and torch/csrc (most of the others are generated, and all alike)."""

    other_batch: int = 0
    """Draw this step's batch anew; 0: none. The same training for all purposes: how much do two such runs differ?"""

    def paths(self) -> tuple[Path, list[Path]]:
        """The folder that names are relative to, and the files in order."""
        if self.data is not None:
            if not self.data.exists():
                raise FileNotFoundError(f"--data: {self.data} does not exist")
            if self.data.is_file():
                return self.data.parent, [self.data]
            root, found = self.data, list(self.data.rglob("*"))
        elif self.corpus == "stdlib":
            root = Path(sysconfig.get_paths()["stdlib"])
            found = list(root.glob("*.py"))
        else:
            root = Path(torch.__file__).parent / "include"
            found = [path for part in ("c10", "torch/csrc") for path in (root / part).rglob("*.h")]
        return root, sorted(path for path in found if path.is_file() and not hidden(path.relative_to(root)))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation text, uint8 [n] each, and what identifies them."""

    train: Tensor
    validation: Tensor
    files: int
    digest: str
    """SHA-256 over names and contents, the first 16 hex digits."""

    def batch(self, step: int, rows: int, seq_len: int, seed: int, *, anew: bool = False) -> tuple[Tensor, Tensor]:
        """The whole global batch of a step: inputs and next bytes, int64 [rows, seq_len] each. `anew`: another one."""
        # Any two seeds (and any two steps) must give unrelated streams: hence one hash of both.
        mixed = hashlib.sha256(f"{seed}:{step}{':anew' if anew else ''}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:6], "big"))
        starts = torch.randint(len(self.train) - seq_len, (rows,), generator=generator)
        return _windows(self.train, starts, seq_len)

    def validation_batches(self, rows: int, count: int, seq_len: int) -> list[tuple[Tensor, Tensor]]:
        """`count` batches of `rows` sequences, evenly spread over the validation text; the same at every call."""
        starts = torch.linspace(0, len(self.validation) - seq_len - 1, rows * count, dtype=torch.float64).long()
        return [_windows(self.validation, part, seq_len) for part in starts.view(count, rows)]


def load_corpus(cfg: DataConfig, seq_len: int) -> Corpus:
    """Read, split by file and digest the text. Every rank reads it; the caller compares the digests."""
    root, paths = cfg.paths()
    digest, sides = hashlib.sha256(), (bytearray(), bytearray())
    for path in paths:
        name, text = path.relative_to(root).as_posix(), path.read_bytes()
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
        # By hash, not by position or at random: a file added later moves no other file to the other side.
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0
        sides[held_out].extend(text)
    if min(map(len, sides)) <= seq_len:  # too few files to split by file: hold out the end of the text
        text = bytes(sides[0] + sides[1])
        cut = len(text) - len(text) // VALIDATION_SHARE
        sides = (bytearray(text[:cut]), bytearray(text[cut:]))
    if min(map(len, sides)) <= seq_len:
        raise ValueError(
            f"--data: {cfg.data or root} holds {sum(map(len, sides))} bytes, too few for sequences of {seq_len}"
        )
    train, validation = (torch.frombuffer(side, dtype=torch.uint8) for side in sides)
    return Corpus(train, validation, len(paths), digest.hexdigest()[:16])


def hidden(path: Path) -> bool:
    """Whether a file is, or lies in, something like .git."""
    return any(part.startswith(".") for part in path.parts)


def _windows(text: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(seq_len + 1)].long()
    # Contiguous: pipeline stages of torch 2.11 compare strides with those of the first batch.
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
