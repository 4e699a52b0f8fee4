"""The lines at the start of a run."""

import pytest

from sheer.announce import describe_batch


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "ranks", "micro", "said"),
    [
        (64, 1, 4, 8, "64 = 4 ranks x 8 x 2 micro-batches"),
        (64, 1, 4, None, "64 = 4 ranks x 16"),
        (64, 2, 1, 32, "128 = 1 rank x 32 x 4 micro-batches"),
        (64, 1, 3, None, "64 = 3 ranks x 21 or 22"),
        (64, 1, 3, 10, "64 = 3 ranks x at most 10 x 3 micro-batches"),
        (8, 1, 2, 16, "8 = 2 ranks x 4"),
    ],
)
def test_how_a_batch_is_divided(batch_size: int, accumulate: int, ranks: int, micro: int | None, said: str) -> None:
    assert describe_batch(batch_size, accumulate, ranks, micro) == said
