"""One decision for all ranks of a torch.distributed job.

The first rank that asks for a name decides; the others take what it puts into the key-value store of the
default process group. Not by a collective: ranks come to a kernel at different times, and some never do.
What is decided so is a kernel's config; which kernel or backend it is each rank finds by its own tables.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

from torch import distributed

#: The longest pause between two questions to the store, in seconds: it answers all ranks one by one.
LONGEST_PAUSE = 0.5


def first_decides(name: str, decide: Callable[[], Any], wait: float) -> Any:
    """decide()'s result, anything that JSON holds, of the first rank that asked for `name`.

    It is this rank's own where there is no other, and, with a warning, where the first one's did not come
    within `wait` seconds, is an error, or the store can't be asked. What decide() raises is raised, and
    the ranks that wait are told.
    """
    if (
        not distributed.is_available()
        or not distributed.is_initialized()
        or distributed.get_world_size() == 1
    ):
        return decide()
    key = f"elman/{name}"
    try:
        store = distributed.group.WORLD.get_group_store()  # type: ignore[union-attr]
        is_first = store.add(f"{key}/asked", 1) == 1
        answer = {} if is_first else _answer(store, key, wait)
    except RuntimeError as error:
        # The process that held it has ended, or it is of a kind that can't do this.
        is_first, answer = False, {"error": f"the job's key-value store can't be asked: {error}"}
    if "decided" in answer:
        return answer["decided"]
    if not is_first:
        warnings.warn(
            f"this rank decides on {name} alone, and its choice may differ from other ranks': "
            f"{answer['error']}",
            stacklevel=2,
        )
        return decide()
    try:
        answer = {"decided": decide()}
    except BaseException as error:
        answer = {"error": f"the rank that was to decide failed: {type(error).__name__}: {error}"}
        raise
    finally:
        # Where the store has gone meanwhile, the ranks that wait find that out themselves.
        with contextlib.suppress(RuntimeError):
            store.set(key, json.dumps(answer))
    return answer["decided"]


def _answer(store: Any, key: str, wait: float) -> dict[str, Any]:
    """What is in the store under `key` within `wait` seconds, else an error to the same form.

    It asks again and again: store.wait would keep every other thread of the process from the store.
    """
    deadline, pause = time.monotonic() + wait, 0.001
    while not store.check([key]):
        if time.monotonic() >= deadline:
            return {"error": f"the rank that was to decide has not in {wait:.0f} seconds"}
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return json.loads(store.get(key))
