"""`Scenes`: the scenes of one search with its source and settings; `find_scenes` returns it, `make_plan` takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

from ingest.request.config import IngestConfig
from ingest.scenes.scene import Scene
from ingest.trust.redact import redact_url
from zarr_store.notebook import rows_table

if TYPE_CHECKING:
    from ingest.scenes.dedupe import Duplicate
    from ingest.scenes.search import Unusable

__all__ = ["Scenes"]

_MAX_ROWS = 60
"""Largest number of scenes that a representation shows."""


@dataclass(frozen=True)
class Scenes(Sequence[Scene]):
    """Scenes of one search, in order of collection, time, tile and id. Slices and `where` keep source and settings.

    Attributes:
        scenes: The scenes.
        source: SOURCE of the search; it decides which hosts plans and workers may open.
        config: Settings of the search.
        unusable: Items that the search left out because they cannot be understood.
        duplicates: Copies of scenes that the search left out.

    Example:
        >>> import ingest
        >>> found = ingest.find_scenes("world/catalog.json", collections=["sentinel-2-l2a"])
        >>> clear = found.where(lambda scene: (scene.cloud_cover or 0) < 60)
        >>> ingest.make_plan(clear, bands=["red", "nir"]).specs[0].band_names
        ('red', 'nir')
    """

    scenes: tuple[Scene, ...]
    source: str
    config: IngestConfig
    unusable: tuple[Unusable, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Iterator[Scene]:
        return iter(self.scenes)

    @overload
    def __getitem__(self, index: int) -> Scene: ...
    @overload
    def __getitem__(self, index: slice) -> Scenes: ...
    def __getitem__(self, index: int | slice) -> Scene | Scenes:
        return replace(self, scenes=self.scenes[index]) if isinstance(index, slice) else self.scenes[index]

    def where(self, keep: Callable[[Scene], bool]) -> Scenes:
        """Keep the scenes for which `keep` returns True."""
        return replace(self, scenes=tuple(scene for scene in self.scenes if keep(scene)))

    def __repr__(self) -> str:
        head = f"<{len(self.scenes)} scenes of {redact_url(self.source)}>"
        shown = [f"  {scene!r}" for scene in self.scenes[:_MAX_ROWS]]
        more = [f"  … and {len(self.scenes) - _MAX_ROWS} more"] if len(self.scenes) > _MAX_ROWS else []
        return "\n".join([head, *shown, *more])

    def _repr_html_(self) -> str:
        rows = [
            (scene.datetime, scene.collection, scene.tile or "", scene.id,
             "" if scene.cloud_cover is None else f"{scene.cloud_cover:.0f} %", ", ".join(scene.assets))
            for scene in self.scenes[:_MAX_ROWS]
        ]  # fmt: skip
        title = f"{len(self.scenes)} scenes of {redact_url(self.source)}"
        if len(self.scenes) > _MAX_ROWS:
            title += f", the first {_MAX_ROWS}"
        return rows_table(title, ("time", "collection", "tile", "id", "cloud", "bands"), rows)
