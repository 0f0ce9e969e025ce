"""How many bytes a product `a @ b.T` must move between device memory and the chip, given the size of the last-level cache.

An operand that is kept in the cache, part after part, is read once; the other one streams by once for every part.
`compulsory` counts everything once, which only an unlimited cache allows; `minimum` is the better of the two schedules
{parts of `a` stay, parts of `b` stay} at the given cache. It models traffic, not time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Bytes of a product's operands, and of everything that is read or written exactly once (results, index lists)."""

    a_bytes: int
    b_bytes: int
    once_bytes: int

    @property
    def compulsory(self) -> int:
        """Everything once."""
        return self.a_bytes + self.b_bytes + self.once_bytes

    def a_resident(self, n_parts: int) -> int:
        """`a` stays in the cache in `n_parts` parts, `b` streams by once for each."""
        return self.a_bytes + n_parts * self.b_bytes + self.once_bytes

    def b_resident(self, n_parts: int) -> int:
        """`b` stays in the cache in `n_parts` parts, `a` streams by once for each."""
        return self.b_bytes + n_parts * self.a_bytes + self.once_bytes

    def minimum(self, cache: int) -> int:
        """The better schedule with parts that just fit the cache."""
        return min(self.a_resident(-(-self.a_bytes // cache)), self.b_resident(-(-self.b_bytes // cache)))
