"""What numpy does on two threads gives what one would: entries above a floor, and each row's largest."""

import pytest
import torch

from saelab.kernels.ragged import largest
from saelab.kernels.torch_backend.flatnonzero import flatnonzero_at_least
from saelab.kernels.torch_backend.halves import in_halves


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 301])
@pytest.mark.parametrize("share", [0.0, 0.004, 0.9])
def test_places_are_those_of_a_comparison(rows, share):
    generator = torch.Generator().manual_seed(rows)
    table = torch.randint(0, 1000, (rows, 192), generator=generator, dtype=torch.int16)
    floor = torch.full((rows,), round(1000 * (1 - share)), dtype=torch.int16)
    floor[::7] += 1
    found = flatnonzero_at_least(table, floor)
    assert found.dtype == torch.int64
    assert torch.equal(found, (table >= floor[:, None]).view(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("rows", [1, 130, 257])
def test_largest_are_those_of_a_sort(rows):
    values = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows))
    found = largest(values, 7)
    want = values.sort(dim=1, descending=True).values[:, :7]
    assert torch.equal(found[:, 0], want[:, 6])
    assert torch.equal(found.sort(dim=1, descending=True).values, want)


def test_an_error_of_either_half_is_raised():
    def work(rows):
        if rows.start:
            raise ValueError("the second half")
        return torch.zeros(rows.stop).numpy()

    with pytest.raises(ValueError, match="second half"):
        in_halves(1000, work)
