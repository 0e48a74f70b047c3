"""One launch of a program: its memory, and whose turn it is."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from .arithmetic import Approximate
from .context import Context, Cta, Fault
from .global_memory import GlobalMemory, WeakStores
from .order import Clocks, Reports
from .program import Program
from .regions import Region
from .tensor_cores import Unit


@dataclass(frozen=True)
class Storage:
    """A tensor's memory. valid, init, host: Region's."""

    mem: np.ndarray
    name: str
    valid: np.ndarray | None = None
    init: np.ndarray | None = None
    host: np.ndarray | None = None


@dataclass(frozen=True)
class Options:
    """Each changes how, never what, a correct kernel computes.

    by_warp: each warp by itself, in an order drawn from the seed, instead of whole programs in step.
    lanes: the order between the lanes of a warp is looked at too.
    weak: other programs see stores late and out of order.
    error: of approximate instructions, as a share of what is allowed.
    truncate: tensor cores cut sums as the hardware does.
    withheld: programs that never start.
    """

    by_warp: bool = False
    seed: int = 0
    lanes: bool = False
    weak: bool = False
    error: float = 0.0
    truncate: bool = False
    withheld: frozenset[tuple[int, int, int]] = frozenset()


#: Blocks that a launch may run.
LIMIT = 50_000_000


class Machine:
    """params: the bits of each parameter. storages: by address. together: programs run at once."""

    def __init__(
        self, program: Program, grid: tuple[int, ...], threads: int, shared: int, params: dict[str, int],
        storages: dict[int, Storage], options: Options, *, unit: Unit | None = None, together: bool = False,
    ):  # fmt: skip
        x, y, z = (*grid, 1, 1)[:3]
        self.program, self.grid, self.threads, self.params = program, (x, y, z), threads, params
        self.shared = shared + program.f.static_shared
        self.by_warp, self.lanes, self.together = options.by_warp, options.lanes, together
        self.random = random.Random(options.seed)
        self.approximate = Approximate(options.error)
        self.unit = unit if options.truncate else None
        self.reports = Reports()
        self.steps = 0
        #: Stores to global memory, as far as others can see them.
        self.stores = 0
        order = [(a, b, c) for c in range(z) for b in range(y) for a in range(x)]
        self.programs = [(n, index) for n, index in enumerate(order) if index not in options.withheld]
        warps = len(order) * threads // 32
        self.clocks = Clocks(warps)
        regions = {
            base: Region(
                s.mem, s.name, self.clocks, 0, warps, self.reports, init=s.init, host=s.host, valid=s.valid
            )
            for base, s in storages.items()
        }
        if options.weak:
            for region in regions.values():
                region.weak = WeakStores(region)
        self.memory = GlobalMemory(regions)
        #: Not by address, which differs from run to run.
        self.weak = sorted((r for r in regions.values() if r.weak is not None), key=lambda r: r.name)

    def run(self) -> Reports:
        """Raises Fault for what no program may do, PtxError for what is not known."""
        with np.errstate(all="ignore"):
            if self.together:
                ctas = [Cta(self, index, n) for n, index in self.programs]
                self._schedule([context for cta in ctas for context in cta.contexts])
            else:
                for n, index in self.programs:
                    self._schedule(Cta(self, index, n).contexts)
            self.memory.flush()
        return self.reports

    def _schedule(self, live: list[Context]) -> None:
        live = list(live)
        while live:
            ready = [c for c in live if not c.blocked]
            if not ready:
                lines = {self.program.blocks[g.block].last.line for c in live for g in c.groups}
                raise Fault(f"deadlock: all {len(live)} contexts wait at barriers, lines {sorted(lines)}")
            context, budget = self._next(ready)
            alone = len(live) == 1 and not self.weak  # of those that ended, too, stores are under way
            context.run(budget, 1 << 60 if alone else 20)
            for region in self.weak:
                self.stores += region.weak.some(self.random)
            if context.done:
                live.remove(context)
            if self.steps > LIMIT:
                raise Fault(f"more than {LIMIT} blocks: it does not end")

    def _next(self, ready: list[Context]) -> tuple[Context, int]:
        """Who runs now, and for how many blocks."""
        if len(ready) == 1:
            return ready[0], 1 << 20
        # Who only waits for a store would take all the time.
        ready = [c for c in ready if not c.waits] or ready
        return self.random.choice(ready), self.random.choice((1, 1, 2, 5, 20, 100, 400))
