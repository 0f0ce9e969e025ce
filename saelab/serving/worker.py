"""The queue of requests and the one thread that runs the model: texts are generated one after the other, each alone.

What a request steers with is open while its own text is generated, and in no other's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from saelab.errors import explain
from saelab.serving.continuation import Continuation, Piece
from saelab.serving.refused import Refused
from saelab.steering import Plan

_LOG = logging.getLogger("saelab")


class Told(NamedTuple):
    """A piece of the text number `choice`."""

    choice: int
    piece: Piece


class Ended(NamedTuple):
    """A text is complete."""

    choice: int
    reason: str
    """"stop" (a stop word, or the model's own end) or "length"."""
    seed: int
    n_new: int
    """Tokens generated, the one that ended the text included."""
    report: tuple[Any, ...]
    """What steering changed, a `HookReport` for each hook; () without any."""


Event = Told | Ended | Refused | None
"""What a request is told; None: all its texts are complete."""


@dataclass(eq=False)
class Job:
    """A request in the queue."""

    prompts: list[list[int]]
    """Token ids."""
    plan: Plan | None
    max_tokens: int
    temperature: float
    seed: int
    n: int
    stop: tuple[str, ...]
    n_top: int | None
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """The thread that owns the model. `most_waiting` limits the queue."""

    def __init__(self, lm: Any, most_waiting: int) -> None:
        self.lm, self.most_waiting = lm, most_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="saelab-serve", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a request at the end of the queue. Raises `Refused` where that is full, or the server stops."""
        with self._changed:
            if self._stopped:
                raise Refused("The server is stopping.", 503)
            if len(self._waiting) >= self.most_waiting:
                raise Refused(
                    f"{len(self._waiting)} requests are waiting already; try again later.", 429, None, "queue_full"
                )
            self._waiting.append(job)
            self._changed.notify()

    def n_before(self, job: Job) -> int:
        """The requests that come before one in the queue, the running one included; 0 once it runs."""
        with self._changed:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def cancel(self, job: Job) -> None:
        """Take a request out of the queue, or end it after the token at hand."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """End all requests, and the thread."""
        with self._changed:
            self._stopped = True
            left = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._changed.notify()
        for job in left:
            job.cancelled.set()
            job.tell(Refused("The server is stopping.", 503))

    def join(self, seconds: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                job = self._running = self._waiting.popleft()
            job.tell(self._answered(job))

    def _answered(self, job: Job) -> Event:
        """Generate the texts of a request; its last event."""
        try:
            for i, prompt in enumerate(job.prompts):
                for j in range(job.n):
                    self._generate(job, i * job.n + j, prompt, job.seed + j)
        except Refused as refused:
            return refused
        except Exception as error:
            said = explain(error)
            if said is not None and (job.plan is not None or isinstance(error, ValueError)):
                return Refused(said, 400, None if job.plan is None else "steering")
            _LOG.exception("A request failed")
            return Refused(said or "The server failed; its log says why.", 500)
        return None

    def _generate(self, job: Job, choice: int, prompt: list[int], seed: int) -> None:
        if job.cancelled.is_set():
            return
        continued, begun = Continuation(self.lm, len(prompt), job.stop, job.n_top), time.monotonic()

        def on_step(n: int, ids: Tensor, logits: Tensor) -> bool:
            piece = continued.add(ids[0].cpu(), logits[0], n == job.max_tokens)
            if piece is not None:
                job.tell(Told(choice, piece))
            return bool(continued.reason) or job.cancelled.is_set()

        steered: AbstractContextManager[Any] = nullcontext() if job.plan is None else self.lm.steer(job.plan)
        with steered:
            self.lm.generate_ids(prompt, job.max_tokens, job.temperature, seed, on_step=on_step)
            report = () if job.plan is None else self.lm.last_report
        seconds = time.monotonic() - begun
        _LOG.info(
            f"{len(prompt)} + {continued.n_new} tokens in {seconds:.1f} s{'' if job.plan is None else ', steered'}"
            f"{', cancelled' if job.cancelled.is_set() else ''}"
        )
        job.tell(Ended(choice, continued.reason, seed, continued.n_new, report))
