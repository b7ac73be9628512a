"""How long a collective takes: an alpha-beta model, NCCL's own, with its constants (network.toml).

    time = base + steps inside a node * nvlink + steps across nodes * net + bytes / bandwidth

with, for n ranks on k nodes (n / k on each),

    all-reduce, tree    2 (n/k - 1) steps inside, 2 floor(log2 k) across; bandwidth bus / 2
    all-reduce, ring    2 (n - 1) steps, 2 (k - 1) of them across;         bandwidth bus * n / (2 (n - 1))
    all-gather, ring    n - 1 steps, k - 1 of them across;                 bandwidth bus * n / (n - 1)
    all-gather, PAT     one GPU a node only: a doubling of nodes and a rank cost a constant each

for each of NCCL's protocols; the fastest is taken, as NCCL takes it. Congestion, other traffic, the slowest of many ranks
and the time to launch are not modelled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).with_name("network.toml")


@dataclasses.dataclass(frozen=True)
class Network:
    """The parameters, as in network.toml."""

    parameters: dict[str, Any]

    @classmethod
    def load(cls, path: Path = DEFAULT) -> Network:
        import tomllib

        return cls(tomllib.loads(path.read_text()))

    @property
    def gpus_per_node(self) -> int:
        return int(self.parameters["node"]["gpus"])

    def nodes(self, ranks: tuple[int, ...]) -> int:
        """Number of nodes that a group's ranks are on, filled in order."""
        return len({rank // self.gpus_per_node for rank in ranks})

    def collective_us(self, kind: str, ranks: int, nodes: int, num_bytes: int) -> float:
        """Microseconds of one collective over `ranks` ranks on `nodes` nodes; `num_bytes` is its result's size."""
        if ranks < 2:
            return 0.0
        choices = self._all_reduce if kind == "all_reduce" else self._all_gather
        return min(latency + num_bytes / (bandwidth * 1e3) for latency, bandwidth in choices(ranks, nodes))

    def _all_reduce(self, n: int, k: int) -> Iterator[tuple[float, float]]:
        """Latency in microseconds and bandwidth in GB/s of each algorithm and protocol."""
        latency, shares = self.parameters["latency_us"], self.parameters["bandwidth"]
        for p in range(len(self.parameters["protocols"]["names"])):
            steps = 2 * (n - 1)
            yield self._ring_us(steps, 2 * (k - 1), n, k, p), self._ring_gb_s(n, k, p) * n / steps
            hops = 2 * (
                (n // k - 1) * latency["nvlink"]["tree"][p] + math.floor(math.log2(k)) * latency["net"]["tree"][p]
            )
            share = shares["tree_one_node" if k == 1 else "tree_many_nodes"][p]
            yield latency["base"]["tree"][p] + hops, self._capped(self._bus_gb_s(n, k) * share, k, p) / 2

    def _all_gather(self, n: int, k: int) -> Iterator[tuple[float, float]]:
        for p in range(len(self.parameters["protocols"]["names"])):
            yield self._ring_us(n - 1, k - 1, n, k, p), self._ring_gb_s(n, k, p) * n / (n - 1)
        if n == k:
            pat = self.parameters["pat_us"]
            latency = self.parameters["latency_us"]["base"]["pat"][-1]
            latency += math.floor(math.log2(k)) * pat["a_doubling"] + n * pat["a_rank"]
            yield latency, self._bus_gb_s(n, k) * self.parameters["bandwidth"]["pat"]

    def _ring_us(self, steps: int, across: int, n: int, k: int, p: int) -> float:
        latency, post = self.parameters["latency_us"], self.parameters["post_us"]
        inside = latency["nvlink"]["ring"][p]
        if k > 1:
            # Even a step inside a node waits for the network's: the ring goes round as one.
            simple = self.parameters["protocols"]["names"][p] == "Simple"
            inside = max(inside, post["network"] * (post["simple_factor"] if simple else 1.0))
        # With one GPU a node nothing overlaps with the network: NCCL takes the tree's latency.
        net = latency["net"]["tree" if n == k else "ring"][p]
        return latency["base"]["ring"][p] + (steps - across) * inside + across * net

    def _ring_gb_s(self, n: int, k: int, p: int) -> float:
        return self._capped(self._bus_gb_s(n, k) * self.parameters["bandwidth"]["ring"][p], k, p)

    def _bus_gb_s(self, n: int, k: int) -> float:
        node = self.parameters["node"]
        return node["nvlink_gb_s"] if k == 1 else min(node["nvlink_gb_s"], node["nic_gb_s"] * (n // k))

    def _capped(self, gb_s: float, k: int, p: int) -> float:
        if self.parameters["protocols"]["names"][p] != "LL":
            return gb_s
        return min(gb_s, self.parameters["bandwidth"]["ll_max_gb_s"][min(k, 3) - 1])
