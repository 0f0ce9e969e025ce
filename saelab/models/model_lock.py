"""The lock of a language model, which a thread takes as often as it needs it, and which any thread may release.

A `with lm.steer(...)` block that a generator holds open ends where the generator ends: in whichever thread closes it, exhausts
it, or drops the last reference. `threading.RLock` refuses that, and would stay locked for ever.
"""

from __future__ import annotations

import threading


class ModelLock:
    """Used as `with lock:`. The thread that took it first keeps it until every one of its blocks has ended."""

    def __init__(self) -> None:
        self._freed = threading.Condition()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._freed:
            self._freed.wait_for(lambda: self._owner in (None, me))
            self._owner, self._depth = me, self._depth + 1

    def __exit__(self, *_: object) -> None:
        with self._freed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._freed.notify()
