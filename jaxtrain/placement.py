"""`PlacementConfig` assigns the parts of a network to devices; the sizes of the mesh follow from it.

Everything else reads the mesh. A placement is a shorter way to say it, and the only way to name branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["PlacementConfig", "fill_groups", "mesh_of_placement"]

_AXES = {"replicated": "data", "stages": "pipe", "filters": "model"}
"""Axis of the mesh that a kind of placement splits."""


class PlacementConfig(BaseModel):
    """The devices of each part of a network; the other axes of `[mesh]` give the size of each group of devices.

    Example:
        >>> PlacementConfig(kind="branches", groups=(("s2", "fusion"), ("s1",))).pipe
        2
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    kind: Literal["mesh", "replicated", "branches", "stages", "filters"] = Field(
        "mesh",
        description="mesh: as [mesh] says · replicated: all of the network on each device · branches: each branch on "
        "its own group of devices · stages: layers in stages · filters: the filters of each layer are split",
    )
    parts: int = Field(0, ge=0, description="replicas, stages, or parts of the filters; 0: two")
    groups: tuple[tuple[str, ...], ...] = Field(
        (),
        description='for branches: what each group of devices holds, e.g. [["s2", "fusion"], ["s1"]]; NAME.1, NAME.2 '
        "are parts of a branch. Empty: each branch has its own group, and the fusion lies with the first",
    )

    @property
    def pipe(self) -> int:
        """Number of groups of devices along the layers or branches."""
        return len(self.groups) if self.kind == "branches" else (self.parts or 2) if self.kind == "stages" else 1

    @model_validator(mode="after")
    def _makes_sense(self) -> PlacementConfig:
        if self.groups and self.kind != "branches":
            raise ValueError(
                f"placement.groups says where branches live, and placement.kind = {self.kind!r} places none: use "
                "kind = 'branches', or leave the groups out"
            )
        if self.parts and self.kind in ("mesh", "branches"):
            raise ValueError(
                f"placement.parts = {self.parts} has no meaning for placement.kind = {self.kind!r}: leave it out"
                + ("; the number of groups is that of placement.groups" if self.kind == "branches" else "")
            )
        return self


def fill_groups(placement: PlacementConfig, branches: Sequence[str]) -> PlacementConfig:
    """Return a placement of branches with its groups: without any, each branch has its own.

    Args:
        placement: Where the parts of the network live.
        branches: Names of the branches.

    Raises:
        ValueError: The network has no branches.

    >>> fill_groups(PlacementConfig(kind="branches"), ["s2", "s1"]).groups
    (('s2', 'fusion'), ('s1',))
    """
    if placement.kind != "branches" or placement.groups:
        return placement
    if not branches:
        raise ValueError(
            "placement.kind = 'branches' is for a network with branches, model.name = 'multimodal': use 'replicated', "
            "'stages' or 'filters' for another"
        )
    first, *others = branches
    return placement.model_copy(update={"groups": ((first, "fusion"), *((name,) for name in others))})


def mesh_of_placement(placement: PlacementConfig, mesh: Mapping[str, Any] | str) -> dict[str, Any]:
    """Return the table `[mesh]` with what the placement says.

    Args:
        placement: Where the parts of the network live.
        mesh: The table as it was given.

    Raises:
        ValueError: The mesh names another number for the same thing, or is chosen by the planner.

    >>> mesh_of_placement(PlacementConfig(kind="stages"), {"data": 2})
    {'data': 2, 'pipe': 2}
    """
    if mesh == "auto" or (not isinstance(mesh, str) and mesh.get("auto")):
        raise ValueError(
            f"mesh = 'auto' chooses a strategy, and placement.kind = {placement.kind!r} is one: leave one of them out"
        )
    if isinstance(mesh, str):
        raise ValueError(f"expected a table [mesh] or 'auto', got {mesh!r}")
    branches = placement.kind == "branches"
    axis = "pipe" if branches else _AXES[placement.kind]
    size = placement.pipe if branches else placement.parts or 2
    said = mesh.get(axis, 1)
    if said not in (1, size):
        source = f"has {size} groups" if branches else f"= {placement.kind!r} has {size} parts"
        raise ValueError(
            f"placement.{'groups' if branches else 'kind'} {source}, and mesh.{axis} = {said}: leave mesh.{axis} out"
        )
    found = {**mesh, axis: size}
    if branches:
        found.setdefault("microbatches", 1)  # branches compute at the same time without cutting a batch
    return found
