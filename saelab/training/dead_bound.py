"""How many features may be dead in a step, from records of earlier steps: room for them is made before their number is known.

A record counts the features that may be dead within `horizon` steps, and none is read later than that. Before the first record
the counters themselves are read, once. What a step computes is independent of how much room there is, so none of this has to
be in a checkpoint.
"""

from __future__ import annotations

from collections import deque

from saelab.errors import TrainingError
from saelab.training.dead_features import DeadFeatures


class DeadBound:
    """For each step in order: `at_most`, then `note_room`; and `read` for the record of each step in order."""

    def __init__(self, dead: DeadFeatures, horizon_tokens: int) -> None:
        since = dead.tokens_since_fired
        self._dead = int((since >= dead.window).sum())
        """At the start of the step whose record is read next."""
        self.at_most = int((since >= dead.window - horizon_tokens).sum())
        """At the start of the step that is made next."""
        self._rooms: deque[int] = deque()
        """Of the steps whose record was not read yet."""

    def note_room(self, room: int) -> None:
        """Note that the step about to be made has room for so many dead features."""
        self._rooms.append(room)

    def forget_rooms(self) -> None:
        """The steps whose record was not read yet are void: each is made again, with a room of its own."""
        self._rooms.clear()

    def read(self, step: int, dead: int, dead_soon: int) -> int:
        """Take in the record of `step`; returns the number of dead features that it began with.

        Raises `TrainingError` if there was no room for them.
        """
        began, room = self._dead, self._rooms.popleft()
        self._dead, self.at_most = dead, dead_soon
        if began > room:
            raise TrainingError(
                f"Step {step} began with {began} dead features but had room for {room}: this is an error of saelab, please "
                "report it. SAELAB_KERNELS=torch trains without this limit; the last checkpoint is intact."
            )
        return began
