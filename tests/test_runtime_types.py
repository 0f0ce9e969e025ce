"""What checks the annotations of saelab in all other tests: that it is in place, what it refuses, and what it lets through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from runtime_types import check, jaxtyped
from torch import Tensor

from saelab.losses import fvu, squared_error, weighted_l1
from saelab.training import TrainConfig

if TYPE_CHECKING:
    from nowhere import Unknown  # pyright: ignore[reportMissingImports]

checked = jaxtyped(typechecker=check)


def test_functions_and_dataclasses_of_saelab_are_checked(monkeypatch):
    x = torch.ones(3, 2)
    for wrong in (lambda: fvu(x, torch.ones(3, 4)), lambda: fvu(x.long(), x), lambda: fvu(x[0], x[0])):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError, match="batch"):
        weighted_l1(x[:, 0], x[:, 0], cast(Any, "3"))
    with pytest.raises(TypeError, match="n_tokens"):
        TrainConfig(n_tokens=cast(Any, "2000"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert squared_error(x.long(), x[0]) == 0


@checked
def doubled(x: Float[Tensor, "n d"], spoil: bool = False) -> Float[Tensor, "n d"]:
    return x[1:] if spoil else 2 * x


def test_an_axis_has_one_size_in_a_call_and_any_in_the_next():
    for shape in ((3, 2), (4, 5)):
        assert torch.equal(doubled(torch.ones(shape)), torch.full(shape, 2.0))
    with pytest.raises(TypeError, match="return"):
        doubled(torch.ones(3, 2), spoil=True)

    @checked
    def outer(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return doubled(x.T).T  # its n is our d

    assert outer(torch.ones(3, 2)).shape == (3, 2)


def test_what_has_no_shapes_is_checked_too():
    @checked
    def repeat(text: str, *, times: int = 1, scale: float = 1.0) -> str:
        return text * times

    assert repeat("a", times=2, scale=3) == "aa"  # an int where a float is asked for
    for wrong in (lambda: repeat(cast(Any, 1)), lambda: repeat("a", times=cast(Any, 2.0))):
        with pytest.raises(TypeError):
            wrong()


def test_names_for_type_checkers_alone_and_generators_are_let_through():
    @checked
    def same(x: Unknown, n: int) -> Unknown:
        return x

    assert same("a", 1) == "a"
    with pytest.raises(TypeError):
        same("a", cast(Any, "b"))

    @checked
    def halves(x: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "n d"]]:
        yield from x.split(2)

    assert len(list(halves(torch.ones(4, 2)))) == 2


def test_a_method_keeps_its_class_and_a_subclass_its_init():
    @checked
    @dataclass(frozen=True)
    class Base:
        x: Float[Tensor, "n d"]

        @checked
        def sizes(self) -> tuple[int, ...]:
            return tuple(self.x.shape)

    class Derived(Base):
        @checked
        def sizes(self) -> tuple[int, ...]:
            return (*super().sizes(), 0)

    assert checked(Derived)(torch.ones(3, 2)).sizes() == (3, 2, 0)
    with pytest.raises(TypeError):
        Derived(torch.ones(3))
