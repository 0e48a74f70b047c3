"""kernels/native.c compiled for this very CPU, on first use, into the user's cache.

The C compiler is what CC names, which may have options behind it, otherwise gcc or clang. It need not be
Triton's (`routing._no_compiler`), for which all of CC is a program's name, be it empty. A library is found
again by a key of all that it was made from: the source and what it includes, the compiler, its flags, and the
CPU's model and instructions, so that a cache which several machines share holds one for each. It is written
in a folder beside its place and then moved there: another process finds all of it or nothing. Its name ends
in a digest of its bytes, and one that was cut short, by a full disk say, is made again: loaded, it would end
the process with a bus error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("kernels") / "native.c"
#: -ffast-math never: see the source. What the machine option is called depends on the processor's family.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
MACHINES = {"x86_64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
#: Seconds until a compiler that doesn't come back is given up; it takes one.
PATIENCE = 120
#: Names of folders to compile in begin so, and one that is so many seconds old is nobody's any more.
MAKING, LEFT = ".making-", 3600
_CPUINFO, _PROCESS = Path("/proc/cpuinfo"), Path("/proc/self")


class CompileError(RuntimeError):
    """The C source could not be compiled or loaded; the message is a sentence that says why."""


def user_folder() -> Path | None:
    """$ELMAN_CACHE_DIR, else elman/ of $XDG_CACHE_HOME or ~/.cache; None for a user without a home."""
    named, cache = os.environ.get("ELMAN_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(os.path.expanduser(named))
    home = os.path.expanduser("~")
    if not cache and home == "~":
        return None
    return Path(cache or os.path.join(home, ".cache"), "elman")


def cache_folder() -> Path | None:
    """native/ in the user's folder, or None: among temporary files anybody could put a library first."""
    folder = user_folder()
    return None if folder is None else folder / "native"


def compiler() -> list[str] | None:
    """The C compiler's path and what CC has behind it, or None."""
    import shlex  # here, as importing elman imports little

    named = os.environ.get("CC")
    for command in [shlex.split(named)] if named else [["gcc"], ["clang"]]:
        path = shutil.which(command[0]) if command else None
        if path:
            return [path, *command[1:]]
    return None


def hopeless(source: Path | None = None) -> str | None:
    """None if it is worth trying, else why not; nothing is compiled to find out."""
    if os.name != "posix":
        return "its C source is for Linux and macOS; use 'eager'"
    machine = platform.machine()
    if machine not in MACHINES:
        return f"this CPU is {machine!r}; its C source is for x86-64 with AVX2 and 64-bit Arm, so use 'eager'"
    if machine == "x86_64" and _CPUINFO.exists() and " avx2 " not in _cpu() + " ":
        return "this CPU has no AVX2, without which there is little to gain; use 'eager'"
    source = source or SOURCE
    if not source.exists():
        return f"{source} is not there; install the package again, or use 'eager'"
    return None


@functools.cache
def _cpu() -> str:
    """The first core's model and instructions, as Linux names them."""
    if not _CPUINFO.exists():
        return platform.processor()
    named = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    first = _CPUINFO.read_text(errors="replace").split("\n\n", 1)[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(named))


_lock = threading.Lock()
#: Libraries, or why there is none: an exception that is raised again and again would keep each call's frames.
_found: dict[tuple[bool, Path], ctypes.CDLL | str] = {}


def _unlock() -> None:
    global _lock
    _lock = threading.Lock()
    _children.add(os.getpid())
    for use_team in _teams:
        use_team(None, None, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)  # a thread that is not in the child may have held it


def library(double: bool = False, source: Path | None = None) -> ctypes.CDLL:
    """The library for float32, or float64; what was found out once holds for the process.

    source: another C source to compile in the same way. Raises CompileError.
    """
    source = source or SOURCE
    found = _found.get((double, source))
    if found is None:
        with _lock:
            found = _found.get((double, source))
            if found is None:
                try:
                    found = _load(double, source)
                except CompileError as error:
                    found = str(error)
                _found[double, source] = found
    if isinstance(found, str):
        raise CompileError(found)
    return found


#: What forgets the Routes that follow from what was found here.
dependents: list[Callable[[], None]] = []


def forget() -> None:
    """Has the next call look for a compiler and a library again."""
    for clear in dependents:
        clear()
    _found.clear()
    _version.cache_clear()


def unavailable(double: bool = False) -> str | None:
    """None if the library can be had, else why not and what to do."""
    try:
        library(double)
    except CompileError as error:
        return str(error)
    return None


def _load(double: bool, source: Path) -> ctypes.CDLL:
    why_not = hopeless(source)
    if why_not:
        raise CompileError(why_not)
    cc = compiler()
    if cc is None:
        named = os.environ.get("CC")
        found = f"CC is {named!r}, which is no program" if named else "there is no gcc and no clang"
        raise CompileError(f"it needs a C compiler, and {found}; install gcc, or use 'eager'")
    flags = [*FLAGS, MACHINES[platform.machine()], *(["-DDOUBLE"] if double else [])]
    folder = cache_folder()
    if folder is None:
        raise CompileError(
            "this user has no home to keep its library in; set the environment variable ELMAN_CACHE_DIR to a "
            "folder, or use 'eager'"
        )
    try:
        made_from = (*_texts(source), _version(*cc), " ".join(flags), _cpu())
        key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
        stem = f"{'float64' if double else 'float32'}-{key}"
        _expect_own(folder)
        kept = folder.glob(f"{stem}-*.so")
        path = next((path for path in kept if path.stem == f"{stem}-{_digest(path)}"), None)
        loaded = ctypes.CDLL(str(path or _compile([*cc, *flags], source, folder, stem)))
    except OSError as error:
        raise CompileError(
            f"its library can't be kept or loaded: {error}; set the environment variable ELMAN_CACHE_DIR to "
            "a folder that can be written into and whose programs may run, or use 'eager'"
        ) from error
    if source == SOURCE:
        _teams.append(loaded.use_team)
        loaded.use_team(*_openmp())
    return loaded


#: Of each library that is loaded, what says whose threads it uses.
_teams: list[Callable[..., Any]] = []


def _openmp() -> list[ctypes.c_void_p | None]:
    """The functions of the OpenMP library that torch has loaded which `use_team` takes, or None thrice."""
    try:
        maps, forked = (_PROCESS / "maps").read_text(errors="replace"), _is_forked()
    except OSError:  # not Linux, or a process that may not read of itself
        return [None, None, None]
    if forked:
        return [None, None, None]
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines()}
    loaded = sorted(path for path in paths if "libgomp" in os.path.basename(path))
    if len(loaded) != 1 or not os.path.exists(loaded[0]):  # an update may have taken the file away
        return [None, None, None]
    library = ctypes.CDLL(loaded[0])
    functions = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_max_threads
    return [ctypes.cast(function, ctypes.c_void_p) for function in functions]


#: Processes that were forked after this file was imported.
_children: set[int] = set()
#: Linux's flag of a process that was forked and has run no other program since, PF_FORKNOEXEC.
_FORKED = 0x40


def _is_forked() -> bool:
    """Whether OpenMP may wait for threads that are not in this process, which perhaps imports only now."""
    fields = (_PROCESS / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return os.getpid() in _children or bool(int(fields[6]) & _FORKED)


def _expect_own(folder: Path) -> None:
    """Raises CompileError where another user could put a library: what is loaded runs as this one."""
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise CompileError(
            f"{folder}, where its library would be kept, is another user's, or others may write into it; set "
            "the environment variable ELMAN_CACHE_DIR to a folder of your own, or use 'eager'"
        )


def _texts(source: Path) -> list[str]:
    """The source, and what it includes by a name in quotes."""
    text = source.read_text(encoding="utf-8")
    included = re.findall(r'^#include "([^"]+)"', text, re.M)
    return [text, *(more for name in included for more in _texts(source.parent / name))]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:  # gone, or not to be read
        return ""


@functools.cache
def _version(*cc: str) -> str:
    try:
        told = _run(*cc, "--version")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(
            f"the C compiler {' '.join(cc)} does not run: {error}; set CC to another, or use 'eager'"
        ) from error
    return " ".join(cc) + told.stdout


def _run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the compiler said; however this ends, all that the compiler started, as gcc does cc1, ends too."""
    process = None
    try:
        with _uninterrupted():
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, **variables},
                start_new_session=True,
            )
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        if process is not None:
            # Nothing of its group is left, as it should be; macOS says it otherwise until it is waited for.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            with process:  # waits, and closes the pipes
                pass
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block ends: a process that begins would else go on, and nobody know of it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield  # such a thread is not interrupted, or the handler isn't Python's
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _compile(command: list[str], source: Path, folder: Path, stem: str) -> Path:
    scratch = tempfile.mkdtemp(prefix=MAKING, dir=folder)
    library = os.path.join(scratch, "library.so")
    try:
        _sweep(folder, os.stat(scratch).st_mtime)
        made = _run(*command, "-o", library, "-x", "c", str(source), "-lm", TMPDIR=scratch)
        if made.returncode:
            first = next(
                (line for line in made.stderr.splitlines() if "error" in line), made.stderr.strip()[:200]
            )
            raise CompileError(
                f"the C compiler failed: {' '.join(command)} on {source.name} says {first!r}; set CC to "
                "another, or use 'eager'"
            )
        ctypes.CDLL(library)  # before it is kept: a compiler may succeed at nothing
        path = folder / f"{stem}-{_digest(Path(library))}.so"
        os.chmod(library, 0o755)  # whatever the umask is: who may write into it has it run as this user
        os.replace(library, path)
        return path
    except subprocess.TimeoutExpired as error:
        raise CompileError(
            f"the C compiler {command[0]} did not come back within {PATIENCE} seconds; set CC to another, or "
            "use 'eager'"
        ) from error
    finally:
        # What can't be removed now, as a program that is killed may write until it ends, is swept later.
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(folder: Path, now: float) -> None:
    """Removes what processes left that were killed while they compiled; now, by the file system's clock."""
    for left in folder.glob(f"{MAKING}*"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if now - left.stat().st_mtime > LEFT:
                shutil.rmtree(left, ignore_errors=True)
