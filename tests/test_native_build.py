"""kernels/native.c compiled on first use: when, for what, by several at once; and what a machine may lack.

Most of these give a shell script for a compiler, which writes down that it was called and copies a library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import elman
from elman import cli, compiled, native

ROOT = Path(__file__).parents[1]
SHAPE = {"batch": 4, "seq": 8, "input": 8, "hidden": 8, "device": "cpu"}
X = torch.ones(2, 3, 4)

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="the compilers here are shell scripts"),
    pytest.mark.skipif(compiled.unavailable() is not None, reason=f"native: {compiled.unavailable()}"),
]
if compiled.unavailable() is None:
    REAL = {double: compiled.library(double)._name for double in (False, True)}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache folder of the test's own; the process forgets what it found here, before and after."""
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path / "cache"))
    compiled.forget()
    yield tmp_path / "cache" / "native"
    compiled.forget()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Makes a script that is the C compiler from now on; returns what counts the libraries it made."""

    def make(version: str = "1.0", instead: str = "", name: str = "cc") -> Callable[[], list[str]]:
        calls = tmp_path / f"{name}.calls"
        script = tmp_path / name
        script.write_text(
            f"""#!/bin/sh
[ "$1" = --version ] && echo {version} && exit 0
echo "$@" >> {calls}
{instead}
while [ "$1" != -o ]; do
    [ "$1" = -DDOUBLE ] && double=yes
    shift
done
if [ $double ]; then cp {REAL[True]} "$2"; else cp {REAL[False]} "$2"; fi
"""
        )
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))
        compiled.forget()
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    return make


def call(backend: str = "native", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return elman.Elman(4, 5, backend=backend, dtype=dtype)(X.to(dtype))[0]


def python(code: str, **environment: str) -> subprocess.Popen:
    inherited = {k: v for k, v in os.environ.items() if k not in ("ELMAN_BACKEND", "TRITON_INTERPRET")}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=inherited | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process: subprocess.Popen) -> str:
    """What the process printed, once it has ended well."""
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


# When, and for what


def test_once_for_each_dtype_s_library(compiler, cache):
    """float16 and bfloat16 are computed in float32."""
    calls = compiler()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert call(dtype=dtype).isfinite().all()
        assert len(calls()) == 1
    call(dtype=torch.float64)
    call(dtype=torch.float64)
    assert ["-DDOUBLE" in line for line in calls()] == [False, True]
    compiled.forget()
    call()
    call(dtype=torch.float64)
    assert len(calls()) == 2, "another process finds what this one compiled"
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == ["float32", "float64"]


def test_another_source_compiler_flag_or_cpu_is_another_library(compiler, monkeypatch, tmp_path):
    """And each is found again when it comes back, as on machines that share a home."""
    calls = compiler()
    call()

    def is_compiled_again() -> bool:
        before = len(calls())
        compiled.forget()
        call()
        return len(calls()) > before

    assert not is_compiled_again()
    source = tmp_path / "native.c"
    source.write_text(compiled.SOURCE.read_text() + "\n")
    changes = {
        "SOURCE": source,
        "FLAGS": (*compiled.FLAGS, "-DOTHER"),
        "MACHINES": dict.fromkeys(compiled.MACHINES, "-march=x86-64-v3"),
        "_cpu": lambda: "another model\nflags : fpu avx2 avx512f",
    }
    for name, changed in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(compiled, name, changed)
            assert is_compiled_again(), name
            assert not is_compiled_again(), name
        assert not is_compiled_again(), name
    compiler(version="1.1")
    assert is_compiled_again(), "the compiler's version"
    calls = compiler(name="cc2")
    assert is_compiled_again(), "the compiler's path"


def test_the_key_has_the_cpu_s_instructions():
    known = compiled._cpu()
    assert known
    if platform.machine() == "x86_64" and sys.platform == "linux":
        assert " avx2" in known


def test_fast_math_is_in_no_command(compiler):
    """Linked with it, a library makes the process flush denormals, and NaN would be none."""
    calls = compiler()
    call()
    for word in ("-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only"):
        assert word not in calls()[0].split()
        assert word not in compiled.FLAGS


DENORMALS = """
import threading, torch, elman
from elman import compiled

def products() -> list[float]:
    return [(torch.full((n,), 1e-38) * 1e-3).max().item() for n in (1, 100)]

before, found = products(), []
for dtype in (torch.float32, torch.float64):
    elman.Elman(4, 5, backend="native", dtype=dtype)(torch.ones(2, 3, 4, dtype=dtype))
thread = threading.Thread(target=lambda: found.extend(products()))
thread.start()
thread.join()
print(before[0] > 0, products() == before, found == before)
torch.set_flush_denormal(True)
elman.Elman(4, 5, backend="native")(torch.ones(2, 3, 4))
print(products())
"""


def test_loading_leaves_denormals_as_they_are(cache):
    """By the real compiler: what it links for -ffast-math, a library brings along."""
    assert printed(python(DENORMALS)).splitlines() == ["True True True", "[0.0, 0.0]"]
    assert len(list(cache.iterdir())) == 2


FIRST_USE = """
import sys, torch, elman
torch.manual_seed(0)
layer = elman.Elman(4, 5, backend="native")
print("ready", flush=True)
sys.stdin.readline()
print(layer(torch.ones(2, 3, 4))[0].sum().item())
"""


def test_processes_that_compile_at_once(compiler, cache):
    """Not at import; then, by a compiler that takes its time, at once: they leave one good library."""
    calls = compiler(instead="sleep 1")
    processes = [python(FIRST_USE) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
        assert calls() == []
        assert not cache.exists()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [printed(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len(calls()) == 2, "they did not compile at once"
    assert len({float(line) for line in said}) == 1
    assert len(list(cache.iterdir())) == 1
    compiled.forget()
    assert call().sum().item() == float(said[0])
    assert len(calls()) == 2, "the library that they left is good"


def test_threads_compile_once(compiler):
    calls = compiler(instead="sleep 0.3")
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls()) == 1


@pytest.mark.parametrize("left", [0, 0.2, 0.5, 0.9, 1])
def test_a_library_that_was_cut_short_is_made_again(compiler, cache, left):
    """Loaded, one in the middle would end the process with SIGBUS."""
    calls = compiler()
    expected = call()
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.unlink()  # this process has it in its memory: a file of its own instead
    path.write_bytes(content[: int(left * len(content))])
    compiled.forget()
    assert torch.equal(call(), expected)
    assert len(calls()) == (1 if left == 1 else 2)
    assert [p.read_bytes() for p in cache.iterdir()] == [content]


# What a machine may lack: one sentence with a remedy, and "auto" does without


def assert_sentence(*words: str) -> None:
    """explain, doctor and the error all say why and what to do, and auto runs eager's loop."""
    for _ in range(2):
        route = elman.explain(**SHAPE)
        assert route.backend == "eager"
        assert route.reason.startswith("auto: not native, because ")
        with pytest.raises(elman.BackendUnavailableError) as raised:
            call()
        told = str(raised.value)
        assert told.startswith("backend 'native' was asked for and can't run: ")
        for word in (*words, "use 'eager'"):
            assert word in route.reason
            assert word in told
        assert "\n" not in told
        assert "Traceback" not in told
        assert torch.equal(call("auto"), call("eager"))
    (line,) = [line for line in cli.doctor().splitlines() if line.startswith("  native: ")]
    assert line.startswith("  native: no: ")
    assert all(word in line for word in words)
    available = elman.available_backends()["native"]
    assert available is not True
    assert f"  native: no: {available}" == line


@pytest.mark.parametrize("cc", ["/nowhere/cc", "no such program"])
def test_no_compiler_by_name(monkeypatch, cc):
    monkeypatch.setenv("CC", cc)
    assert_sentence("C compiler", f"CC is {cc!r}", "install gcc")


@pytest.mark.parametrize("cc", ["", "gcc -pipe"])
def test_a_compiler_with_options_and_one_that_is_not_named(monkeypatch, cache, cc):
    monkeypatch.setenv("CC", cc)
    assert elman.explain(**SHAPE).backend == "native"
    assert len(list(cache.iterdir())) == 1


def test_a_compiler_that_succeeds_at_nothing(monkeypatch, cache):
    monkeypatch.setenv("CC", "true")
    assert_sentence("kept or loaded")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_may_write_into(cache, mode):
    """Another user's library would run as this one."""
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert_sentence(str(cache), "others may write into it", "ELMAN_CACHE_DIR")
    cache.chmod(0o700)
    compiled.forget()
    assert elman.explain(**SHAPE).backend == "native"


def test_no_other_may_write_into_the_library(cache):
    """By the real compiler, which goes by the umask."""
    before = os.umask(0)
    try:
        compiled.library()
    finally:
        os.umask(before)
    (path,) = cache.iterdir()
    assert path.stat().st_mode & 0o777 == 0o755


def test_no_compiler(monkeypatch, tmp_path, cache):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_sentence("there is no gcc and no clang", "install gcc")
    assert not cache.exists()


def test_an_error_does_not_grow(monkeypatch):
    """It was one object once, raised by each call, with the frames of them all."""
    monkeypatch.setenv("CC", "/nowhere/cc")
    for _ in range(20):
        assert compiled.unavailable()
    with pytest.raises(compiled.CompileError) as raised:
        compiled.library()
    assert len(traceback.extract_tb(raised.value.__traceback__)) < 5


FAILING = {
    "says why": ("echo 'native.c:1: fatal error: no headers' >&2; exit 1", "no headers"),
    "says nothing": ("exit 3", "failed"),
    "is killed": ("kill -9 $$", "failed"),
    "says it in Latin-1": ("printf 'error: \\374bel\\n' >&2; exit 1", "bel"),
    "makes no library": ("echo text > out; for a; do o=$b; b=$a; done; exit 0", "can't be kept or loaded"),
}


@pytest.mark.parametrize("how", FAILING)
def test_a_compiler_that_fails(compiler, cache, monkeypatch, tmp_path, how):
    monkeypatch.chdir(tmp_path)
    instead, word = FAILING[how]
    calls = compiler(instead=instead)
    assert_sentence(word)
    assert len(calls()) == 1, "it is asked once a process"
    if how != "makes no library":
        assert list(cache.iterdir()) == []


def test_a_compiler_that_is_no_program(monkeypatch, tmp_path):
    (tmp_path / "cc").write_bytes(b"\x7fELF, but no more")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert_sentence("does not run", "set CC to another")


def test_a_compiler_that_hangs(compiler, cache, monkeypatch):
    monkeypatch.setattr(compiled, "PATIENCE", 0.5)
    compiler(instead="exec sleep 60")
    start = time.monotonic()
    assert_sentence("did not come back within 0.5 seconds", "set CC to another")
    assert time.monotonic() - start < 20
    assert list(cache.iterdir()) == []


@pytest.fixture
def driver(compiler, tmp_path):
    """driver(ends): the compiler starts another program, as gcc does, and then does as `ends` says.

    Returns what reads a line that it wrote, "" once both have ended.
    """
    os.mkfifo(tmp_path / "alive")
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)

    def make(ends: str) -> Callable[[], str]:
        # Both hold the pipe's other end, and the other program no more than that.
        begins = f'exec 3> {tmp_path / "alive"}; : > "${{TMPDIR:?}}/cc1.s"; sleep 20 > /dev/null 2>&1 &'
        compiler(instead=f"{begins} echo $$ >&3; {ends}")
        return lambda: os.read(alive, 100).decode() if select.select([alive], [], [], 10)[0] else "waits"

    yield make
    os.close(alive)


@pytest.mark.parametrize("ends", ["wait", "exit 1", "kill -9 $$"])
def test_nothing_that_a_compiler_started_is_left(driver, cache, monkeypatch, ends):
    monkeypatch.setattr(compiled, "PATIENCE", 0.5 if ends == "wait" else 60)
    read = driver(ends)
    with pytest.raises(compiled.CompileError, match="did not come back" if ends == "wait" else "failed"):
        compiled.library()
    assert int(read()) > 0
    assert read() == ""
    assert list(cache.iterdir()) == []


def test_ctrl_c_stops_a_compiler_within_a_second(driver, cache):
    read = driver("wait")
    process = python(FIRST_USE)
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
        assert int(read()) > 0
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        took = time.monotonic() - sent
    finally:
        process.kill()
        process.wait()
    assert err.endswith("KeyboardInterrupt\n")
    assert took < 3, "a second, on a machine that others use too"
    assert read() == ""
    assert list(cache.iterdir()) == []


def test_what_a_killed_process_left_is_swept(driver, compiler, cache):
    """An hour later, by the next that compiles: until then it may be at work."""
    read = driver("wait")
    process = python(FIRST_USE)
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
        group = int(read())
    finally:
        process.kill()
        process.communicate()
    os.killpg(group, signal.SIGKILL)
    (left,) = cache.iterdir()
    assert [path.name for path in left.iterdir()] == ["cc1.s"]
    compiler()
    call()
    assert left.exists()
    now = time.time()
    os.utime(left, (now, now - 3700))
    call(dtype=torch.float64)
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == ["float32", "float64"]


def test_a_version_that_hangs(compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "PATIENCE", 0.5)
    (tmp_path / "cc").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert_sentence("does not run", "set CC to another")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    """Below a file no folder can be made, by root neither."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("ELMAN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_sentence("can't be kept or loaded", "ELMAN_CACHE_DIR")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_cache_that_is_read_only(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o555)
    assert_sentence("can't be kept or loaded", "ELMAN_CACHE_DIR")


def test_a_cache_whose_programs_may_not_run(compiler, monkeypatch):
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    compiler()
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert_sentence("failed to map segment", "ELMAN_CACHE_DIR")


def test_a_user_without_a_home(monkeypatch):
    """Not among temporary files: there anybody may put a library first."""
    for name in ("ELMAN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123456)  # in no list of users
    assert_sentence("no home", "ELMAN_CACHE_DIR")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv("ELMAN_CACHE_DIR", "~/elsewhere")
    assert compiled.cache_folder() == Path("/home/user/elsewhere/native")
    monkeypatch.delenv("ELMAN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert compiled.cache_folder() == Path("/xdg/elman/native")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiled.cache_folder() == Path("/home/user/.cache/elman/native")


@pytest.mark.parametrize("machine", ["riscv64", "ppc64le", "i686"])
def test_a_foreign_cpu(compiler, monkeypatch, machine):
    calls = compiler()
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert_sentence(f"this CPU is {machine!r}")
    assert calls() == []


def test_a_cpu_without_avx2(compiler, monkeypatch, tmp_path):
    calls = compiler()
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : An Old One\nflags : fpu sse2 avx\n\n")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiled, "_CPUINFO", tmp_path / "cpuinfo")
    compiled._cpu.cache_clear()
    try:
        assert_sentence("no AVX2")
    finally:
        compiled._cpu.cache_clear()
    assert calls() == []


def test_no_source(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "SOURCE", tmp_path / "native.c")
    assert_sentence("native.c is not there", "install the package again")


def test_an_openmp_library_whose_file_is_gone(monkeypatch, tmp_path):
    """An update of torch took it while the process runs: threads are the kernel's own."""
    (tmp_path / "maps").write_text("7f00-7f01 r-xp 00000000 08:01 5    /nowhere/libgomp.so.1 (deleted)\n")
    (tmp_path / "stat").write_text("1 (python) R 1 1 1 0 -1 4194304 0\n")
    monkeypatch.setattr(compiled, "_PROCESS", tmp_path)
    assert call().isfinite().all()
    assert compiled._openmp() == [None, None, None]


def test_the_commands_without_a_compiler():
    environment = {**os.environ, "CC": "/nowhere/cc"}
    environment.pop("ELMAN_BACKEND", None)
    done = subprocess.run(
        [sys.executable, "-m", "elman", "doctor"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "  native: no: it needs a C compiler, and CC is '/nowhere/cc', which is no program" in done.stdout


def test_a_graph_that_a_machine_with_a_compiler_made(monkeypatch, fresh_compiler, tmp_path):
    """What auto became in it is decided where it runs; asked for by name, native stays native."""
    layer = elman.Elman(4, 5).requires_grad_(False)
    expected, eager = layer(X)[0], elman.Elman(4, 5, backend="eager")
    eager.load_state_dict(layer.state_dict())
    exported = torch.export.export(layer, (X,))
    torch.export.save(exported, tmp_path / "layer.pt2")
    graph = torch.compile(layer, backend="aot_eager")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    named = elman.Elman(4, 5, backend="native").requires_grad_(False)
    named = torch.export.export(named, (X,)).module()
    ran = []
    forward = native.forward
    monkeypatch.setattr(native, "forward", lambda *arguments: ran.append(1) or forward(*arguments))
    for made in (graph, loaded):
        assert torch.equal(made(X)[0], expected)
    assert len(ran) == 2, "native where it can run"
    monkeypatch.setenv("CC", "/nowhere/cc")
    compiled.forget()
    for made in (graph, loaded):
        assert torch.equal(made(X)[0], eager(X)[0])
    assert len(ran) == 2
    with pytest.raises(elman.BackendUnavailableError, match=r"can't run: it needs a C compiler"):
        named(X)
