"""What a compiled Triton kernel takes on the chip, read from its machine code: NVIDIA's SASS or AMD's GCN."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

#: What the instructions of a loop are counted by: mnemonics' beginnings, NVIDIA's and AMD's.
KINDS = {
    "tensor": re.compile(r"(H|HG|Q|QG|D|I|IG|UTC\w+)MMA|v_(s?mfma|smfmac|wmma)"),
    "loads": re.compile(r"LDSM?\b|ds_(read|load)"),
    "barriers": re.compile(r"BAR\b|s_barrier"),
    "spills": re.compile(r"(LD|ST)L\b|scratch_(load|store)"),
}
GLOBAL_LOAD = re.compile(r"LDG\b|global_load|buffer_load")
GLOBAL_STORE = re.compile(r"STG\b|ST\.E|(global|buffer|flat)_store")
MULTIPLY_ADD = re.compile(r"[FDH]FMA|v_(pk_)?(fma|fmac|mac|mad)_")


@dataclass(frozen=True)
class Instruction:
    mnemonic: str
    target: int | None = None  # index of the instruction that it may jump to
    ends: bool = False  # whether the next one can't follow it


def resources(kernel: Any) -> dict[str, int]:
    """Registers a thread, and the bytes of memory that it keeps what does not fit into them in."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        count, spilled, private = (int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1]) for name in names)
        return {"registers": count, "spills": max(private, 4 * spilled)}
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump(kernel, "--dump-resource-usage"))
    assert found, "cuobjdump --dump-resource-usage names no registers"
    return {"registers": int(found[1]), "spills": int(found[2])}


def instructions(kernel: Any) -> list[Instruction]:
    """The kernel's machine code. Raises RuntimeError where it can't be read."""
    if "amdgcn" in kernel.asm:
        return parse_gcn(kernel.asm["amdgcn"])
    code = parse_sass(_cuobjdump(kernel, "--dump-sass"))
    if not code:
        raise RuntimeError("cuobjdump --dump-sass prints no instructions")
    return code


def count(code: list[Instruction]) -> dict[str, int]:
    """How many instructions there are, and how many of each of the KINDS."""
    kinds = {kind: sum(bool(p.match(i.mnemonic)) for i in code) for kind, p in KINDS.items()}
    return {"instructions": len(code), **kinds}


def late_loads(loop: list[Instruction]) -> int:
    """Loads from global memory after the loop's last barrier; 0 if it has none: each thread is alone."""
    barriers = [n for n, i in enumerate(loop) if KINDS["barriers"].match(i.mnemonic)]
    after = loop[barriers[-1] :] if barriers else []
    return sum(bool(GLOBAL_LOAD.match(i.mnemonic)) for i in after)


def time_loop(code: list[Instruction]) -> list[Instruction]:
    """The smallest loop with a third of the products that stores to global memory, inner loops included.

    Without one that stores, the smallest with a third of the products; [] if none has. Not the largest loop:
    around the time steps there may be one over batch tiles, and before them one that makes the first product.
    Products are tensor-core instructions, or multiply-adds where there are none.
    """
    patterns = KINDS["tensor"], MULTIPLY_ADD
    products = next((p for p in patterns if any(p.match(i.mnemonic) for i in code)), MULTIPLY_ADD)
    weight = [bool(products.match(i.mnemonic)) for i in code]
    found = [body for body in _loops(code) if 3 * sum(weight[i] for i in body) >= max(sum(weight), 1)]
    storing = [body for body in found if any(GLOBAL_STORE.match(code[i].mnemonic) for i in body)]
    return [code[i] for i in sorted(min(storing or found, key=len, default=set()))]


def _loops(code: list[Instruction]) -> Iterable[set[int]]:
    """The natural loops, as the indices of their instructions.

    A jump backwards alone is no loop: rare code is laid out behind the end, and jumps back from there.
    """
    successors = [_successors(i, code) for i in range(len(code))]
    predecessors: list[list[int]] = [[] for _ in code]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].append(i)
    reached = _reachable(0, successors)
    bodies: dict[int, set[int]] = {}
    for end, head in [(i, j) for i in sorted(reached) for j in successors[i] if j <= i]:
        # It is a loop if nothing gets to its end but through its head.
        if end == head or end not in _reachable(0, successors, without=head):
            body = _reachable(end, predecessors, without=head) & reached
            bodies.setdefault(head, {head}).update(body)
    return bodies.values()


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of `cuobjdump --dump-sass`, without the padding behind the last one."""
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    lines = re.findall(pattern, text, re.MULTILINE)
    index = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    code = []
    for i, (_, guard, mnemonic, operands) in enumerate(lines):
        name = mnemonic.split(".")[0]
        jump = re.search(r"(.*?)\b0x([0-9a-f]+)", operands) if name == "BRA" else None
        target = index.get(int(jump[2], 16)) if jump else None
        if target == i:
            break  # the padding begins with a jump to itself
        # A condition is a guard before the mnemonic, or a operand before the target.
        sure = not guard and not (jump and jump[1].strip())
        code.append(Instruction(mnemonic, target, sure and name in ("BRA", "EXIT", "RET")))
    return code


def parse_gcn(text: str) -> list[Instruction]:
    """The instructions of LLVM's assembly for AMD, up to the end of the kernel."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(found)
        elif line.startswith((".Lfunc_end", "\t.section\t.rodata")):
            break
        elif instruction := re.match(r"\t([a-z]\w+)(.*)", line):
            found.append((instruction[1], instruction[2]))
    code = []
    for mnemonic, operands in found:
        branch = mnemonic.startswith(("s_branch", "s_cbranch"))
        target = labels.get(operands.split(";")[0].strip()) if branch else None
        code.append(Instruction(mnemonic, target, mnemonic in ("s_branch", "s_endpgm")))
    return code


def _successors(i: int, code: list[Instruction]) -> list[int]:
    following = [] if code[i].ends or i + 1 == len(code) else [i + 1]
    return following if code[i].target is None else [*following, code[i].target]


def _reachable(start: int, edges: list[list[int]], without: int | None = None) -> set[int]:
    """What can be reached from start along the edges, not going through `without`."""
    if start == without:
        return set()
    seen, waiting = {start}, [start]
    while waiting:
        for j in edges[waiting.pop()]:
            if j not in seen and j != without:
                seen.add(j)
                waiting.append(j)
    return seen


def _cuobjdump(kernel: Any, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option}: {done.stderr.strip() or done.returncode}")
    return done.stdout
