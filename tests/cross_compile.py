"""Compiles the kernels for GPUs that are not here, and prints what each takes on the chip.

    python -m tests.cross_compile sm_90 bf16:256 fp32:128:tf32x3 ...

Triton must not have been imported with TRITON_INTERPRET set, so the tests run this as a program.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elman.kernels import configs, resident, step

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "resident forward": resident.forward_kernel,
    "resident backward": resident.backward_kernel,
    "step forward": step.forward_kernel,
    "step backward": step.backward_kernel,
    "cell": step.cell_kernel,
}


def build(name: str, target: str, dtype: str, H: int, precision: str, lengths: bool, B: int = 16):
    """The compiled kernel and its config, at the config that the launcher would choose."""
    kernel, itemsize = KERNELS[name], ITEMSIZE[dtype]
    if name == "cell":
        config = configs.choose_cell(B, H, H, itemsize)
    elif name.startswith("step"):
        config = configs.choose_step(B, H, 1, itemsize)
    else:
        config = configs.choose_resident(B, H, 1, itemsize, precision=precision)
    constants = {
        "H": H,
        "I": H,
        "g_h": 1,
        "RELU": False,
        "PRECISION": precision,
        "ACC": tl.float64 if dtype == "fp64" else tl.float32,
        "INTERPRET": False,
        "HAS_LENGTHS": lengths,
        "HAS_G_OUT": True,
        "HAS_G_HN": True,
        "HAS_BIAS": True,
        **vars(config),
    }
    numbers = ("s", "T", "B")
    strides = ("z_t", "z_b", "g_t", "g_b", "out_t", "out_b", "dz_t", "dz_b", "x_b", "h_b")
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in numbers:
            signature[argument] = "i32"
        else:
            signature[argument] = "i32" if argument in strides else f"*{dtype}"
            if argument not in strides or H % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    if "lengths" in signature:
        signature["lengths"] = "*i64"
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
        attrs=attributes,
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=TARGETS[target], options=options), config


def resources(kernel) -> str:
    """Registers and stack (what spills) of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        found = re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", kernel.asm["amdgcn"])
        return " ".join(f"{name} {number}" for name, number in found)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return " ".join(re.findall(r"(?:REG|STACK):\d+", report))


def report(target: str, dtype: str, H: int, precision: str) -> None:
    """Prints a line for each kernel at this size; raises SystemExit if one takes more than modelled."""
    for name in KERNELS:
        resident_kernel = name.startswith("resident")
        if resident_kernel and not configs.resident_fits(H, ITEMSIZE[dtype], precision=precision):
            print(f"{target} {dtype} {precision} H={H} {name}: does not fit")
            continue
        for lengths in (True,) if name == "cell" else (False, True):
            start = time.perf_counter()
            kernel, config = build(name, target, dtype, H, precision, lengths)
            seconds = time.perf_counter() - start
            bound = configs.DEFAULT_LIMIT
            if resident_kernel:
                bound = configs.resident_bytes(H, ITEMSIZE[dtype], precision, config.BLOCK_B)
            shared = kernel.metadata.shared
            print(
                f"{target} {dtype} {precision} H={H} {name}{' lengths' * lengths}: "
                f"shared {shared} of {bound}, {resources(kernel)}, {seconds:.1f} s, {config}",
                flush=True,
            )
            if shared > bound:
                raise SystemExit(f"{name} takes {shared} bytes of shared memory; the model said {bound}.")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is set: there is nothing to compile. Unset it.")
    target = sys.argv[1]
    for case in sys.argv[2:]:
        dtype, H, precision = (*case.split(":"), "ieee")[:3]
        report(target, dtype, int(H), precision)
