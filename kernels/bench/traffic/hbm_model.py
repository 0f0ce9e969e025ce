"""Model the device-memory traffic of a product `a @ b.T`, in bytes, for a given size of the last-level cache.

An operand that is held in the cache part by part is read once; the other one is streamed once for every part. `compulsory`
counts everything once, which would take an unlimited cache; `minimum` is the better of the two schedules (parts of `a` or parts
of `b` stay in the cache) at the given cache size. It models traffic, not time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Bytes of the operands of a product, and of everything that is read or written exactly once (results, index lists)."""

    a_bytes: int
    b_bytes: int
    once_bytes: int

    @property
    def compulsory(self) -> int:
        """Traffic if everything is read or written once."""
        return self.a_bytes + self.b_bytes + self.once_bytes

    def a_resident(self, n_parts: int) -> int:
        """Traffic if `a` stays in the cache in `n_parts` parts and `b` is streamed once for each."""
        return self.a_bytes + n_parts * self.b_bytes + self.once_bytes

    def b_resident(self, n_parts: int) -> int:
        """Traffic if `b` stays in the cache in `n_parts` parts and `a` is streamed once for each."""
        return self.b_bytes + n_parts * self.a_bytes + self.once_bytes

    def minimum(self, cache: int) -> int:
        """Traffic of the better schedule, with parts that just fit the cache."""
        return min(self.a_resident(-(-self.a_bytes // cache)), self.b_resident(-(-self.b_bytes // cache)))
