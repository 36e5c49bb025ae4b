"""`refuse_mismatch` refuses data that differ from those of training, or warns where the user insists on them.

Pixels of another size, images of another size and numbers in another unit give answers that look right and are not. So
they are refused unless `--allow-mismatch` says that they are meant.
"""

from __future__ import annotations

from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.ground import ground_scale

__all__ = ["check_pixels", "check_side", "refuse_mismatch"]

_TOLERANCE = 0.05
"""Largest relative difference between pixel sizes that counts as equal, such as 10 m and 0.0001° of latitude."""


def refuse_mismatch(what: str, remedy: str, *, insist: bool) -> str:
    """Refuse data that differ from those of training; if the user insists on them, return a warning.

    Args:
        what: The difference, as a clause.
        remedy: Advice for the user.
        insist: Whether the user insists.

    Raises:
        InvalidInput: The user does not insist.
    """
    if insist:
        return f"{what}; they are used as they are (--allow-mismatch)"
    raise InvalidInput(f"{what}: {remedy}, or use them as they are with --allow-mismatch")


def check_pixels(there: Grid, trained: Grid, url: str, *, insist: bool) -> list[str]:
    """Refuse a cube whose pixels are larger or smaller on the ground than those of training; return warnings.

    Args:
        there: Grid of the cube.
        trained: Grid of the training cube.
        url: The cube, for messages.
        insist: Whether the user insists on other pixels.

    Raises:
        InvalidInput: They differ by more than 5 %.
    """
    ours, theirs = _metres(trained), _metres(there)
    if all(abs(one - other) <= _TOLERANCE * other for one, other in zip(theirs, ours, strict=True)):
        return []
    return [refuse_mismatch(
        f"pixels of {url} are {_size(theirs)} on the ground, and the model was trained on pixels of {_size(ours)}",
        f"ingest the ground at --resolution {min(ours):.4g} in metres", insist=insist,
    )]  # fmt: skip


def check_side(size: tuple[int, int], trained: int, url: str, *, insist: bool) -> list[str]:
    """Refuse images of another size than those of training; return warnings.

    Args:
        size: (height, width) of the images, pixels.
        trained: Height of the images of training, pixels.
        url: Where the images are, for messages.
        insist: Whether the user insists on them.

    Raises:
        InvalidInput: They have another size.
    """
    if size[0] == trained:
        return []
    return [refuse_mismatch(
        f"images of {url} have {size[0]} × {size[1]} pixels, and the model was trained on images of {trained}",
        "cut or resample them to that size", insist=insist,
    )]  # fmt: skip


def _metres(grid: Grid) -> tuple[float, float]:
    x, y = ground_scale(grid)
    return (grid.resolution[0] * x, grid.resolution[1] * y)


def _size(metres: tuple[float, float]) -> str:
    x, y = (f"{value:.3g}" for value in metres)
    return f"{x} m" if x == y else f"{x} × {y} m"
