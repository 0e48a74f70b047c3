"""ld, st, atom, red: PTX ISA, "Data Movement and Conversion Instructions" and "Memory Consistency Model"."""

from __future__ import annotations

import numpy as np

from ..parser import WIDTHS, Reg, Vec
from .registers import CANONICAL, KIND, UNTYPED, Registers, form, poison

u8 = np.uint8
#: Triton writes the modifiers in various orders.
VECTOR = r"((v2|v4|v8)\.)?"
TYPE = r"([bus](8|16|32|64)|f32|f64)"
UPDATES = ("add", "exch", "cas", "min", "max", "and", "or", "xor")
ATOMIC = rf"((global|shared|gpu|sys|acquire|release|acq_rel|relaxed|{'|'.join(UPDATES)})\.)+[bus](32|64)"


class Memory(Registers):
    @form("ld", r"param\.[bus](8|16|32|64)")
    def ld_param(self, i, d, mem):
        self.set(d, UNTYPED[d.width], f"c.param({mem.base.name!r}, {mem.offset}, {d.width})")

    @form("ld", rf"shared\.{VECTOR}{TYPE}")
    @form("ld", rf"((global|volatile|acquire|relaxed|gpu|sys|ca|cg|L1::\w+)\.)+{VECTOR}{TYPE}")
    def ld(self, i, d, mem):
        items = d.items if isinstance(d, Vec) else (d,)
        space, words = self._space(i), set(i.mods)
        spec = self.spec(
            space=space, size=WIDTHS[i.mods[-1]] // 8, vector=len(items), signed=i.mods[-1][0] == "s",
            polls=bool({"volatile", "relaxed", "acquire"} & words), acquire="acquire" in words,
            widths=[x.width for x in items],
        )  # fmt: skip
        olds = "".join(self.old(x, UNTYPED[x.width]) + ", " for x in items) if i.predicate is not None else ""
        loaded = self.name(f"c.load({spec}, {self.address(mem, space)}, {self.condition()}, ({olds}))")
        for n, item in enumerate(items):
            self.set(item, UNTYPED[item.width], f"{loaded}[{n}]", merged=True)

    @form("st", rf"shared\.{VECTOR}{TYPE}")
    @form("st", rf"((global|volatile|release|relaxed|gpu|sys|cg)\.)+{VECTOR}{TYPE}")
    def st(self, i, mem, s):
        items = s.items if isinstance(s, Vec) else (s,)
        space, size = self._space(i), WIDTHS[i.mods[-1]] // 8
        spec = self.spec(space=space, size=size, release="release" in i.mods)
        values = []
        for x in items:
            width = x.width if isinstance(x, Reg) else size * 8
            value = self.val(x, UNTYPED[width], full=True)
            values.append(value if width == size * 8 else f"{value}.astype({UNTYPED[size * 8]})")
        self.emit(f"c.store({spec}, {self.address(mem, space)}, {self.condition()}, ({', '.join(values)},))")

    @form("atom", ATOMIC)
    def atom(self, i, d, mem, *values):
        kind = CANONICAL.get(i.mods[-1], i.mods[-1])
        result = self._atomic(i, mem, values, kind, self.old(d, kind))
        self.set(d, kind, result, merged=True)

    @form("red", ATOMIC)
    def red(self, i, mem, *values):
        self._atomic(i, mem, values, CANONICAL.get(i.mods[-1], i.mods[-1]), "None")

    def _atomic(self, i, mem, values, kind, old):
        words = set(i.mods)
        spec = self.spec(
            space=self._space(i), size=WIDTHS[kind] // 8, kind=kind,
            what=[*words.intersection(UPDATES)].pop(),
            acquire=bool(words & {"acquire", "acq_rel"}), release=bool(words & {"release", "acq_rel"}),
        )  # fmt: skip
        texts = "".join(self.val(v, kind, full=True) + ", " for v in values)
        return self.name(
            f"c.atomic({spec}, {self.address(mem, self._space(i))}, {self.condition()}, ({texts}), {old})"
        )

    def _space(self, i):
        if not {"shared", "global"} & set(i.mods):
            raise ValueError("a generic address")
        return "shared" if "shared" in i.mods else "global"


class MemoryOperations:
    """A context's accesses to memory. m: a mask of its threads, or None for all."""

    def param(self, name, offset, width):
        bits = self.machine.params[name] >> (8 * offset)
        return self.full(KIND[UNTYPED[width]](bits & ((1 << width) - 1)))

    def chosen(self, m):
        """The indices of the mask's threads; None for all."""
        if m is None:
            return None
        which = np.nonzero(m)[0]
        return None if len(which) == self.n else which

    def pieces(self, spec, address, which, width, space):
        """(region, which threads, offsets): what `width` bytes at these addresses are, which may be wrong."""
        odd = (address & address.dtype.type(width - 1)) != 0
        if odd.any():
            at = int(address[int(np.argmax(odd))])
            self.fault(spec.line, f"an access of {width} bytes at {at:#x}: {spec.text}")
        if space == "shared":
            region, off = self.cta.shared, address.astype(np.int64)
            if (off + width > len(region.mem)).any():
                self.fault(
                    spec.line,
                    f"shared memory of {len(region.mem)} bytes accessed at {off.max()}: {spec.text}",
                )
            return [(region, which, off)]
        found, bad = self.machine.memory.find(address, width)
        if bad is not None:
            k = int(np.argmax(bad))
            thread = int(self.tid[k if which is None else which[k]])
            self.fault(
                spec.line,
                f"out of bounds at {int(address[k]):#x} ({self.machine.memory.near(int(address[k]))}), "
                f"{int(bad.sum())} threads, thread {thread} of program {self.cta.index}: {spec.text}",
            )
        return [(r, k if which is None else (which if k is None else which[k]), off) for r, k, off in found]

    def load(self, spec, address, m, olds):
        if spec.polls:
            self.polls, self.polled_at = self.polls + 1, self.machine.stores
        which = self.chosen(m)
        out = [o.copy() for o in olds] if olds else [poison(w, self.n) for w in spec.widths]
        if which is not None:
            address = address[which]
            if not len(which):
                return out
        for region, k, off in self.pieces(spec, address, which, spec.size * spec.vector, spec.space):
            threads = self.of(k)
            ordered = spec.space == "shared" or not spec.polls
            region.read(off, spec.size * spec.vector, threads, spec, ordered=ordered)
            if spec.acquire:
                for g, o in set(zip(threads.gids.tolist(), off.tolist(), strict=True)):
                    self.machine.clocks.acquire(g, (id(region), o))
            for n in range(spec.vector):
                value = region.value(
                    off + n * spec.size, spec.size, self.cta, threads.gids if ordered else None
                )
                width = spec.widths[n]
                if width != 8 * spec.size:
                    if spec.signed:
                        value = value.view(KIND[f"s{8 * spec.size}"]).astype(KIND[f"s{width}"])
                    value = value.astype(KIND[UNTYPED[width]])
                if k is None:
                    out[n] = value
                else:
                    out[n][k] = value
        return out

    def store(self, spec, address, m, values):
        if spec.space == "global":
            self.polls = 0
            self.machine.stores += 1
        which = self.chosen(m)
        if which is not None:
            address = address[which]
            if not len(which):
                return
        for region, k, off in self.pieces(spec, address, which, spec.size * len(values), spec.space):
            parts = [v if k is None else v[k] for v in values]
            data = np.stack(parts, 1) if len(parts) > 1 else np.ascontiguousarray(parts[0])
            data = data.view(u8).reshape(len(off), -1)
            threads = self.of(k)
            region.write(off, data, threads, spec)
            region.put(off, data, spec)
            if region.weak is not None:
                region.weak.delay(self.cta.number, off, data, spec.size, threads.gids)
            else:
                self.machine.clocks.overwrite(threads.gids, id(region), off, data.shape[1])
            if spec.release:  # with the store itself: whoever acquires must find the release
                self.machine.memory.flush(self.cta.number)
                for g, o in set(zip(threads.gids.tolist(), off.tolist(), strict=True)):
                    self.machine.clocks.release(g, (id(region), o))

    def atomic(self, spec, address, m, values, old):
        if spec.space == "shared":
            self.fault(spec.line, f"atomics on shared memory: {spec.text}")
        if spec.acquire:
            self.polls, self.polled_at = self.polls + 1, self.machine.stores
        else:
            self.polls = 0
            self.machine.stores += 1
        which = np.arange(self.n) if m is None else np.nonzero(m)[0]
        result = None if old is None else old.copy()
        if not len(which):
            return result
        for region, k, off in self.pieces(spec, address[which], which, spec.size, "global"):
            region.read(off, spec.size, self.of(k), spec, ordered=False)
            if region.weak is not None:
                region.weak.settle(self.cta.number, off, spec.size)
            memory = region.views[spec.size].view(KIND[spec.kind])
            for t, o in zip(k.tolist(), off.tolist(), strict=True):  # one thread after the other
                g, key, place = int(self.gids[t]), (id(region), o), o // spec.size
                if spec.release:
                    self.machine.memory.flush(self.cta.number)
                    self.machine.clocks.release(g, key)
                if spec.acquire:
                    self.machine.clocks.acquire(g, key)
                before = memory[place]
                memory[place] = _updated(spec.what, before, *(v[t] for v in values))
                region.made(o, spec.size)
                if result is not None:
                    result[t] = before
        return result


def _updated(what, before, value, other=None):
    with np.errstate(over="ignore"):
        if what == "cas":
            return other if before == value else before
        if what == "exch":
            return value
        return {
            "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            "max": np.maximum, "min": np.minimum,
        }[what](before, value)  # fmt: skip
