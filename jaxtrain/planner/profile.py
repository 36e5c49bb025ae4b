"""Profiles of machines: speed, memory and bandwidth of a device, and the links between devices.

A profile is a TOML file. Those that come with terrashard lie in `profiles/`; a user's own is named by its path. Every
quantity carries its unit (`"3.35 TB/s"`), because a factor of eight between bits and bytes is the most common mistake.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput

__all__ = ["Curve", "Device", "Link", "Profile", "kind_of", "profile_names", "quantity", "read_profile"]

MOST_BYTES = 1 << 20
PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9}
SHAPES = {
    "bytes": (r"(?P<prefix>[kMGT]?i?)B", PREFIX, 1.0),
    "bytes a second": (r"(?P<prefix>[kMGT]?i?)B/s", PREFIX, 1.0),
    "bits a second": (r"(?P<prefix>[kMGT]?)bit/s", PREFIX, 1 / 8),
    "operations a second": (r"(?P<prefix>[kMGT]?)FLOP/s", PREFIX, 1.0),
    "seconds": (r"(?P<prefix>[muµn]?)s", SMALL, 1.0),
}
EXAMPLE = {
    "bytes": "80 GB",
    "bytes a second": "3.35 TB/s or 400 Gbit/s",
    "operations a second": "67 TFLOP/s",
    "seconds": "5 us",
}


def quantity(value: Any, kind: str) -> float:
    """Return a quantity such as `"3.35 TB/s"` in its base unit: bytes, bytes a second, operations a second or seconds.

    Raises:
        ValueError: the unit is missing or is one of another kind.
    """
    for shape in (kind, "bits a second") if kind == "bytes a second" else (kind,):
        unit, prefixes, factor = SHAPES[shape]
        found = re.fullmatch(rf"(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*{unit}", str(value).strip())
        if found:
            number = float(found["number"]) * prefixes[found["prefix"]] * factor
            if number > 0 or kind == "seconds":
                return number
    raise ValueError(f"must be a number with its unit ({kind}), such as {EXAMPLE[kind]!r}, got {value!r}")


def _of(kind: str) -> BeforeValidator:
    return BeforeValidator(lambda value: value if isinstance(value, float) else quantity(value, kind))


Bytes = Annotated[float, _of("bytes")]
Rate = Annotated[float, _of("bytes a second")]
Operations = Annotated[float, _of("operations a second")]
Seconds = Annotated[float, _of("seconds")]
Portion = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Curve(_Strict):
    """Seconds of one instruction by its size, as measured at some sizes."""

    sizes: tuple[float, ...] = Field(min_length=1)
    """Operations of convolutions and products, bytes of everything else; ascending."""
    seconds: tuple[float, ...]
    intensity: float | None = Field(None, gt=0)
    """Operations for each byte that was read or written; None where the rate does not depend on it."""

    @model_validator(mode="after")
    def _is_a_curve(self) -> Curve:
        ascending = all(a < b for a, b in pairwise(self.sizes))
        if len(self.sizes) != len(self.seconds) or not ascending or min(*self.sizes, *self.seconds) <= 0:
            raise ValueError("a curve needs ascending sizes, and seconds above 0 for each of them")
        return self

    def at(self, size: float) -> float:
        """Return the seconds at a size: in proportion between two measured sizes and above, the least below.

        >>> Curve(sizes=(1e3, 1e5), seconds=(1e-5, 1e-4)).at(1e4), Curve(sizes=(1e3,), seconds=(1e-5,)).at(10)
        (3.1622776601683795e-05, 1e-05)
        """
        if size <= self.sizes[0]:
            return self.seconds[0]
        if size >= self.sizes[-1]:
            return self.seconds[-1] * size / self.sizes[-1]
        above = next(i for i, one in enumerate(self.sizes) if one > size)
        (x, y), (u, v) = ((self.sizes[i], self.seconds[i]) for i in (above - 1, above))
        return y * math.pow(v / y, math.log(size / x) / math.log(u / x))

    def times(self, factor: float) -> Curve:
        """Return the curve of a machine that takes `factor` times as long."""
        return self.model_copy(update={"seconds": tuple(factor * one for one in self.seconds)})


class Device(_Strict):
    """One device: an accelerator, or a processor as JAX sees it."""

    kind: Literal["cpu", "gpu", "tpu"]
    memory: Bytes
    """Bytes that a program may use; of a processor the memory of the machine divided by its devices."""
    bandwidth: Rate
    """Bytes a second between its memory and its arithmetic."""
    peak: dict[Literal["float32", "bfloat16"], Operations]
    """Operations a second of matrix products and convolutions, by number type of the model."""
    elementwise: Operations
    """Operations a second of all other arithmetic."""
    reached: Portion = 0.5
    """Share of the peak that convolutions reach."""
    reached_bandwidth: Portion = 0.8
    """Share of the bandwidth that fused loops reach."""
    launch: Seconds = 0.0
    """Seconds that each instruction costs besides its work."""
    together: float | None = Field(None, ge=1)
    """Rate of all devices of one processor together, in rates of one alone; None where devices share nothing."""
    measured: dict[str, Curve] = {}
    """Seconds of an instruction by its kind (`operations.KINDS`), where one device works alone; none of a datasheet.

    `convolution-8` is the curve of convolutions of 8 filters: the fewer filters, the fewer operations a second.
    """
    busy: dict[str, Curve] = {}
    """The same while all devices work."""
    sharing: int = Field(1, ge=1)
    """Devices that worked at once when `busy` was measured."""

    def seconds(self, kind: str, size: float, devices: int, *, intensity: float = math.inf) -> float:
        """Return the measured seconds of one instruction while so many devices work.

        Args:
            kind: one of `operations.KINDS`.
            size: operations of convolutions and products, bytes of everything else.
            devices: Devices that work at the same time.
            intensity: Operations of a convolution or product for each byte that it reads or writes.
        """
        alone = _between(self.measured, kind, size, intensity)
        if self.sharing == 1 or devices == 1:
            return alone
        share = min(1.0, (devices - 1) / (self.sharing - 1))
        return alone + share * (_between(self.busy, kind, size, intensity) - alone)

    def slowed(self, devices: int) -> float:
        """Return how much longer work takes on each of several devices that work at once."""
        return 1.0 if self.together is None else max(1.0, devices / self.together)


def _between(curves: Mapping[str, Curve], kind: str, size: float, intensity: float) -> float:
    """Return the seconds at a size from the two curves of a kind whose intensities lie around that of an instruction.

    >>> few, many = (Curve(sizes=(1e3,), seconds=(one,), intensity=i) for one, i in ((4e-5, 10.0), (1e-5, 40.0)))
    >>> curves = {"convolution": many, "convolution-8": few}
    >>> [_between(curves, "convolution", 1e3, intensity) for intensity in (5.0, 20.0, 80.0)]
    [4e-05, 2e-05, 1e-05]
    """
    alike = [curve for name, curve in curves.items() if kind_of(name) == kind and curve.intensity is not None]
    if not alike:
        return curves[kind].at(size)
    alike.sort(key=lambda curve: curve.intensity or 0.0)
    above = next((i for i, curve in enumerate(alike) if (curve.intensity or 0.0) >= intensity), len(alike) - 1)
    high, low = alike[above], alike[max(above - 1, 0)]
    x, y, (a, b) = low.at(size), high.at(size), (low.intensity or 1.0, high.intensity or 1.0)
    if a == b or intensity <= a or intensity >= b:
        return x if intensity <= a else y
    return x * math.pow(y / x, math.log(intensity / a) / math.log(b / a))


def kind_of(curve: str) -> str:
    """Return the kind of instruction that a curve is of: `convolution-8` is a curve of `convolution`."""
    return curve.partition("-")[0]


class Link(_Strict):
    """One level of the network, from the inside out."""

    name: str
    devices: int | None = Field(None, gt=1)
    """Devices that it joins, counting all levels inside; None for any number."""
    bandwidth: Rate
    """Bytes a second that a device sends in one direction while it receives as many."""
    latency: Seconds
    """Seconds of one message."""


class Profile(_Strict):
    """A machine that is planned for."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    device: Device
    links: tuple[Link, ...] = Field(min_length=1)
    overlap: float = Field(0.0, ge=0, le=1)
    """Share of the exchange of gradients that passes while the backward pass still computes."""
    scatters: bool = True
    """Its compiler makes a reduce-scatter of an all-reduce whose parts are kept."""
    half: bool = True
    """It reduces bfloat16 as bfloat16."""
    combined: Bytes = 0.0
    """Bytes of small exchanges that its compiler joins into one message; 0 for none."""
    exchanges: dict[str, Curve] = {}
    """Seconds of one collective by its kind and the bytes of its results, as measured; none of a datasheet."""
    processes: int = Field(1, ge=1)
    """Processes among which the devices were divided when it was measured."""
    cost_an_hour: float | None = Field(None, gt=0)
    """Price of one device for an hour, in the user's currency; None where it is not known."""
    sources: dict[str, str] = {}
    """Source of each number; assumed numbers are marked as such."""

    @model_validator(mode="after")
    def _links_grow(self) -> Profile:
        sizes = [link.devices for link in self.links]
        if any(size is None for size in sizes[:-1]) or any(
            b is not None and a is not None and b <= a for a, b in pairwise(sizes)
        ):
            raise ValueError(f"links go from the inside out, each with more devices than the one before: got {sizes}")
        return self

    def link(self, span: int) -> Link | None:
        """Return the innermost link that joins `span` devices with following numbers; None where none does."""
        return next((link for link in self.links if link.devices is None or span <= link.devices), None)


def profile_names() -> list[str]:
    """Return the names of the profiles that come with terrashard."""
    return sorted(path.name.removesuffix(".toml") for path in files(__package__).joinpath("profiles").iterdir()
                  if path.name.endswith(".toml"))  # fmt: skip


def read_profile(name: str) -> Profile:
    """Read a profile by its name, or a user's own by its path (`*.toml`).

    Raises:
        InvalidInput: there is no such profile, or a value is missing, has no unit or cannot be.
    """
    if name.endswith(".toml") or "/" in name:
        if not Path(name).is_file():
            raise InvalidInput(
                f"there is no profile at {name}: give the path of a TOML file, or one of {', '.join(profile_names())}"
            )
        try:
            return _parse(read_file(Path(name), MOST_BYTES, f"profile {name}").decode("utf-8"), name)
        except UnicodeDecodeError as error:
            raise InvalidInput(f"profile {name} must be TOML in UTF-8: {error}") from error
    known: dict[str, Profile] = {}
    for one in profile_names():
        text = files(__package__).joinpath("profiles", f"{one}.toml").read_text(encoding="utf-8")
        profile = _parse(text, one)
        known |= dict.fromkeys([profile.name, *profile.aliases], profile)
    if name not in known:
        raise InvalidInput(
            f"there is no profile {name!r}{_nearest(name, list(known))}: known are {', '.join(sorted(known))}; "
            "a profile of your own is a path that ends in .toml"
        )
    return known[name]


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, 1, 0.4)
    return f" (nearest: {found[0]})" if found else ""


def _parse(text: str, where: str) -> Profile:
    try:
        return Profile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"profile {where} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the profile"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        plain = {"missing": "is missing; the profiles that come with terrashard show what a machine needs",
                 "extra_forbidden": "is not a number of a machine: leave it out"}  # fmt: skip
        said = plain.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise InvalidInput(f"profile {where}: {place} {said}{more}") from error
