"""Options that `search`, `preview`, `plan` and `ingest` share: the fields of `IngestConfig` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cli.session import Session
    from ingest.request.config import IngestConfig

__all__ = ["COMPOSING", "GRID", "RUNNING", "SELECTION", "SOURCE_HELP", "TRUST", "ingest_config"]

SOURCE_HELP = (
    "STAC API URL, catalog.json or collection.json (path or URL), item collection file (also .gz, or one item a "
    "line), or stac-geoparquet."
)


def _option(kind: Any, *names: str, panel: str, text: str, metavar: str | None = None) -> Any:
    return Annotated[kind | None, typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)]


_WHAT, _HOW, _MASK, _RUN, _WHO = "Selection", "Grid", "Masking and compositing", "Running", "Trust"

SELECTION: dict[str, Any] = {
    "collections": _option(list[str], "--collection", panel=_WHAT, metavar="NAME", text="Collection id; repeatable."),
    "bbox": _option(str, "--bbox", panel=_WHAT, metavar="W,S,E,N", text="Region in degrees."),
    "geometry": _option(
        Path, "--geometry", panel=_WHAT, metavar="FILE", text="Region: GeoJSON, WKT, GeoParquet or GeoPackage, any CRS."
    ),
    "wrap": _option(
        bool,
        "--wrap",
        panel=_WHAT,
        text="The region is meant as written, although it is wider than 180 degrees.",
    ),
    "datetime": _option(str, "--datetime", panel=_WHAT, metavar="A/B", text="Date or range; both ends are included."),
    "query": _option(
        list[str], "--query", panel=_WHAT, metavar="COND", text="Condition, such as 'eo:cloud_cover<40'; repeatable."
    ),
    "bands": _option(str, "--bands", panel=_WHAT, metavar="A,B", text="Band names, such as red,nir,scl."),
    "max_items": _option(int, "--max-items", panel=_WHAT, metavar="N", text="Stop after this many scenes."),
    "strict": _option(
        bool, "--strict", panel=_WHAT, text="Turn warnings about item counts, absent bands and odd pixels into errors."
    ),
}
TRUST: dict[str, Any] = {
    "sign": _option(
        str, "--sign", panel=_WHO, metavar="NAME", text="Sign hrefs when they are read: planetary-computer."
    ),
    "providers": _option(
        list[str], "--provider-file", panel=_WHO, metavar="FILE", text="TOML file with the rules of one more provider."
    ),
    "allow_hosts": _option(
        list[str], "--allow-host", panel=_WHO, metavar="NAME", text="One more host that hrefs may name."
    ),
    "allow_local": _option(
        list[str], "--allow-local", panel=_WHO, metavar="ROOT", text="One more folder that local hrefs may lie in."
    ),
    "allow_private_hosts": _option(
        bool, "--allow-private-hosts", panel=_WHO, text="Allow private and loopback addresses."
    ),
    "requester_pays": _option(
        bool, "--requester-pays", panel=_WHO, text="Read buckets that bill their readers, with your keys."
    ),
}
GRID: dict[str, Any] = {
    "crs": _option(
        str, "--crs", panel=_HOW, metavar="EPSG:N", text="CRS of the cube; default: that of most source pixels."
    ),
    "resolution": _option(
        float,
        "--resolution",
        panel=_HOW,
        metavar="R",
        text="Pixel size in CRS units; default: the finest of the files.",
    ),
    "resampling": _option(
        str, "--resampling", panel=_HOW, metavar="NAME", text="Kernel: nearest, bilinear, cubic or average."
    ),
    "profile": _option(
        str, "--profile", panel=_HOW, metavar="NAME", text="Layout: train, timeseries, archive or fast."
    ),
    "read_overviews": _option(
        bool,
        "--overviews",
        panel=_HOW,
        text="Where the grid is at least twice as coarse as a file, read reflectance from its overviews.",
    ),
    "native": _option(
        bool,
        "--native",
        panel=_HOW,
        text="Keep each band at its own pixel size: groups NAME_10m, NAME_20m, NAME_60m on nested grids.",
    ),
}
COMPOSING: dict[str, Any] = {
    "mask": _option(str, "--mask", panel=_MASK, metavar="NAME", text="Mask of clouds and shadows: scl or none."),
    "mask_dilate_m": _option(
        float, "--mask-dilate", panel=_MASK, metavar="M", text="Grow masked areas by this many metres."
    ),
    "group": _option(str, "--group", panel=_MASK, metavar="NAME", text="Time steps: solar-day, item or month."),
    "reduce": _option(
        str,
        "--reduce",
        panel=_MASK,
        metavar="NAME",
        text="Combine scenes of a time step: first, median or mean.",
    ),
    "indices": _option(str, "--index", panel=_MASK, metavar="A,B", text="Spectral indices to compute: ndvi,ndwi …"),
    "clip": _option(bool, "--clip/--no-clip", panel=_MASK, text="Cut out the polygons of --geometry (default)."),
    "offset_policy": _option(
        str,
        "--offset-policy",
        panel=_MASK,
        metavar="NAME",
        text="What to do when pixels contradict the -1000 offset: repair, warn or fail.",
    ),
}
RUNNING: dict[str, Any] = {
    "workers": _option(
        str,
        "--workers",
        panel=_RUN,
        metavar="N|LEAST..MOST",
        text="Number of worker processes; a range adapts to the work.",
    ),
    "threads_per_worker": _option(int, "--threads-per-worker", panel=_RUN, metavar="N", text="Threads of each worker."),
    "memory": _option(str, "--memory", panel=_RUN, metavar="4GB", text="Memory limit of one worker."),
    "scheduler": _option(str, "--scheduler", panel=_RUN, metavar="tcp://…", text="Use a running Dask cluster."),
    "cluster": _option(
        str,
        "--cluster",
        panel=_RUN,
        metavar="KIND",
        text="Where workers start: local, ssh, slurm, pbs, k8s or gateway.",
    ),
    "hosts": _option(
        str,
        "--hosts",
        panel=_RUN,
        metavar="A,B,…",
        text="Hosts for --cluster ssh: the scheduler's, then one per worker.",
    ),
    "cluster_options": _option(
        list[str],
        "--cluster-option",
        panel=_RUN,
        metavar="KEY=VALUE",
        text="Setting of the cluster, such as queue=short or image=NAME; repeatable.",
    ),
    "tls": _option(
        str, "--tls", panel=_RUN, metavar="FOLDER", text="Encrypt with ca.pem, cert.pem and key.pem in this folder."
    ),
    "expose": _option(
        bool,
        "--expose",
        panel=_RUN,
        text="Open the scheduler (which runs code) and the dashboard to other machines, without TLS.",
    ),
    "rate_limits": _option(
        list[str],
        "--rate-limit",
        panel=_RUN,
        metavar="HOST=N",
        text="Largest number of requests per second to a host, from all workers together.",
    ),
    "dashboard": _option(str, "--dashboard", panel=_RUN, metavar=":8787", text="Address of the Dask dashboard."),
    "on_error": _option(
        str, "--on-error", panel=_RUN, metavar="NAME", text="What to do with an unreadable asset: retry, skip or fail."
    ),
    "limit": _option(int, "--limit", panel=_RUN, metavar="N", text="Stop after this many shards."),
    "store": _option(
        str,
        "--store",
        panel=_RUN,
        metavar="NAME",
        text="Kind of a new cube: folder, or icechunk (one commit for each run).",
    ),
    "timeout_s": _option(float, "--timeout", panel=_RUN, metavar="S", text="Seconds that a server may be silent."),
    "retries": _option(int, "--retries", panel=_RUN, metavar="N", text="How often a failed request is repeated."),
}


def ingest_config(session: Session) -> IngestConfig:
    """Build the configuration from the settings file, then --set, then options; later ones win."""
    from cli.config import merge
    from ingest.request.settings import make_config

    settings = session.settings()
    where = str(session.config) if session.config else ("--set" if session.overrides else "options")
    return make_config(None, merge(settings, session.options), where=where)
