"""The model of the shm ring: whole it holds, and each order that is taken away is missed."""

import pytest

from model_ring import WEAKENED, check


@pytest.mark.parametrize("processor", ["x86", "weak"])
def test_the_protocol_holds_in_every_order(processor: str) -> None:
    states, wrong = check("", processor)
    assert wrong == ""
    assert states > 10_000  # it did go everywhere


@pytest.mark.parametrize(
    ("weak", "processor"), [(weak, on) for weak, where in WEAKENED.items() for on in where]
)
def test_an_order_that_is_missing_is_found(weak: str, processor: str) -> None:
    _, wrong = check(weak, processor)
    assert wrong
