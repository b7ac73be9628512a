"""ClipMonitor, which watches every gradient norm of a run at one copy to the host every few steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_clip.clipper import GradClipper
from dist_clip.layouts.process_groups import group_size
from dist_clip.memory.host_copy import HostCopy
from dist_clip.monitor.collect import Collector, Place, Window
from dist_clip.monitor.record import Writer
from dist_clip.monitor.spikes import SpikeDetector
from dist_clip.step import ClipReport
from dist_clip.step.guarding import checked_loss

if TYPE_CHECKING:
    from dist_clip.monitor.picture import Picture


class ClipMonitor:
    """Records the norm, usual norm and scale of every tensor at every step, and names the culprits of spikes.

    The numbers stay on the device. Every `every` steps the ranks bring them together and the first rank copies them to
    its host, without waiting for the copy; its writers get them when it has arrived. Construction, and every call of a
    method, is for all ranks alike.

    A tensor's *level* is its usual norm: the policy's own where it remembers one, else a moving geometric mean as
    `LogClip` has it. A *spike* is a step at which the loss or the global norm lies far above the steps before
    (`SpikeDetector`), a tensor ten times above its level, a norm was NaN or Inf, or the step was skipped.

    Args:
        clipper: the clipper; None where something else clips, for the loss and the numbers that `step` is given.
        writers: a writer, or several; see `JSONLWriter`, `TensorBoardWriter`, `WandbWriter`, `MLflowWriter`, `Writer`.
        every: steps between two copies to the host, at least 1.
        top: how many culprits a spike names, at least 0.
        tensors_every: steps between two tables of all tensors; None: `every`; 0: no tables.
        header: what else the writers should know of the run.
        warmup: how many norms of a tensor must be known before it can stand out, as early norms change by themselves.
        window, sigmas: of the `SpikeDetector` of loss and global norm.
        last_rank: the last rank has the writers, as in Megatron, not the first one.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Example:
        >>> import torch, dist_clip
        >>> from dist_clip.monitor import JSONLWriter
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clipper = dist_clip.GradClipper(model, dist_clip.LogClip())
        >>> with dist_clip.ClipMonitor(clipper, JSONLWriter("runs/a/log.jsonl")) as monitor:
        ...     for step in range(1, 21):
        ...         loss = model(torch.ones(1, 2)).square().mean()
        ...         loss.backward()
        ...         report = clipper.clip_()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         monitor.step(step, loss)
    """

    def __init__(
        self,
        clipper: GradClipper | None,
        writers: Writer | Sequence[Writer],
        *,
        every: int = 10,
        top: int = 5,
        tensors_every: int | None = None,
        header: Mapping[str, Any] | None = None,
        warmup: int = 100,
        window: int = 128,
        sigmas: float = 6.0,
        last_rank: bool = False,
    ) -> None:
        if clipper is not None and not isinstance(clipper, GradClipper):
            raise TypeError(f"ClipMonitor needs a GradClipper or None, got {type(clipper).__name__}")
        counts = {"every": (every, 1), "top": (top, 0), "tensors_every": (tensors_every or 0, 0), "warmup": (warmup, 0)}
        for name, (value, least) in counts.items():
            if not isinstance(value, int) or value < least:
                raise ValueError(f"ClipMonitor: {name} must be a whole number >= {least}, got {value!r}")
        self.every, self._top, self._warmup = every, top, warmup
        self.tensors_every = every if tensors_every is None else tensors_every
        self._clipper, self._last_rank = clipper, last_rank
        self._writers = list(writers) if isinstance(writers, Sequence) else [writers]
        self._detectors = {name: SpikeDetector(window, sigmas) for name in ("loss", "grad norm")}
        self._seen = None if clipper is None else clipper.last_report
        self._rows: list[Tensor] = []
        self._states: list[Tensor] = []
        self._more: list[Tensor] = []
        self._window = Window([], [], [])
        self._copies: deque[tuple[HostCopy, Window, Picture]] = deque()
        self._closed = False
        self._read_layout()
        if self._collector.first:
            for writer in self._writers:
                writer.start({**self._header(), **(header or {})})

    def _read_layout(self) -> None:
        from dist_clip.monitor.picture import Picture  # needs numpy, which importing dist_clip does not

        policies = [] if self._clipper is None else [group.policy for group in self._clipper.memory.groups]
        self._collector = Collector(self._clipper, last_rank=self._last_rank)
        self._picture = Picture(self._collector.sources, policies, self._top, self._warmup, self._detectors)

    def _header(self) -> dict[str, Any]:
        import dist_clip  # not at the top: dist_clip imports this module

        header: dict[str, Any] = {
            "tensors": len(self._picture.names),
            "versions": {"torch": torch.__version__, "dist_clip": dist_clip.__version__},
        }
        if self._clipper is not None:
            memory = self._clipper.memory
            header["policy"] = self._clipper.policy.config()
            header["guards"] = [held.guard.config() for held in memory.guards]
            header["ranks"] = group_size(self._clipper._options.process_group)
        return header

    @torch.no_grad()
    def step(
        self,
        step: int,
        loss: Tensor | float | None = None,
        *,
        report: ClipReport | None = None,
        scalars: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Record one step. Call it after ``clip_()``, or after the step of an attached optimizer. Never syncs the host.

        Args:
            step: the step's number.
            loss: this rank's loss, a number or a tensor of one element; the mean over the ranks that have one is written.
            report: what ``clip_`` returned. None: the clipper's last report, if it is another one than at the last call.
            scalars: more numbers to write, such as the learning rate; the first rank's are written.

        Raises:
            RuntimeError: the monitor is closed.
            TypeError, ValueError: the loss is no scalar.
        """
        if self._closed:
            raise RuntimeError("this ClipMonitor is closed")
        if self._clipper is not None:
            if self._clipper.layout is not self._collector.layout:  # refresh() was called
                self.flush()
                self._read_layout()
            latest = self._clipper.last_report
            report = latest if report is None and latest is not self._seen else report
            self._seen = latest
        if loss is not None and not (type(loss) is Tensor and loss.ndim == 0 and loss.device == self._collector.device):
            loss = checked_loss(loss, self._collector.device)  # a number, or a tensor that needs a second look
        self._rows.append(self._collector.row(loss, report))
        kept: dict[str, Any] = {}
        for name, value in (scalars or {}).items():
            kept[name] = Place(len(self._more)) if isinstance(value, Tensor) else value
            if isinstance(value, Tensor):
                self._more.append(value.detach())
        if self.tensors_every and step % self.tensors_every == 0:
            self._window.tables.append(len(self._window.steps))
            self._states.append(self._collector.state())
        self._window.steps.append(step)
        self._window.scalars.append(kept)
        if len(self._rows) == self.every:
            self._send()
        self._write(wait=False)

    def write_arrived(self) -> None:
        """Write what has arrived on the host, as `step` does too. Neither collective nor a host sync.

        Example:
            >>> import torch, dist_clip
            >>> monitor = dist_clip.ClipMonitor(dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip()), [])
            >>> monitor.write_arrived()
        """
        self._write(wait=False)

    def _send(self) -> None:
        """Bring the rows together, and start their copy to the host. Collective."""
        if not self._rows:
            return
        numbers = self._collector.bring_together(self._rows, self._states, self._more)
        if self._collector.first:
            self._copies.append((HostCopy(numbers), self._window, self._picture))
        self._rows, self._states, self._more, self._window = [], [], [], Window([], [], [])

    def _write(self, *, wait: bool) -> None:
        """Hand over what has arrived on the host, or, if `wait`, all that is on its way."""
        while self._copies and (wait or self._copies[0][0].arrived):
            copy, window, picture = self._copies.popleft()
            for record in picture.records(copy.read(), window):
                for writer in self._writers:
                    writer.write(record)

    @torch.no_grad()
    def flush(self) -> None:
        """Write all steps so far, and wait for them. Collective.

        Example:
            >>> import torch, dist_clip
            >>> monitor = dist_clip.ClipMonitor(dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip()), [])
            >>> monitor.flush()
        """
        self._send()
        self._write(wait=True)

    def close(self) -> None:
        """Write all steps so far, and close the writers. Collective."""
        if not self._closed:
            self.flush()
            self._close_writers()

    def _close_writers(self) -> None:
        self._closed = True
        if self._collector.first:
            for writer in self._writers:
                writer.close()

    def __enter__(self) -> ClipMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:  # the other ranks may never come, so only what they have sent is written
            self._write(wait=True)
            self._close_writers()
