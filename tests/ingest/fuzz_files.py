"""Raster files of every packing, hostile ones made by hand, and mutations of all of them, each fixed by its number."""

from __future__ import annotations

import functools
import random
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import rasterio

SHAPE = (150, 210)
TRANSFORM = rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)
TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}
GEO = {
    33550: (12, struct.pack("<3d", 10, 10, 0)),
    33922: (12, struct.pack("<6d", 0, 0, 0, 5e5, 5e6, 0)),
    34735: (3, struct.pack("<16H", 1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)),
}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_FORMS = {1: "B", 3: "H", 4: "I", 16: "Q"}


def scene(dtype: str, seed: int = 4) -> np.ndarray:
    smooth: np.ndarray = np.random.default_rng(seed).normal(0, 3, SHAPE).cumsum(axis=1) + 900
    pixels: np.ndarray = np.abs(smooth) % 250 if dtype in ("uint8", "int8") else np.abs(smooth)
    return pixels.astype(dtype)


def written(dtype: str, *, overviews: Any = False, mask: Any = False, **options: Any) -> bytes:
    """A file of GDAL's."""
    bands = options.get("count", 1)
    profile = {"driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "count": 1, "dtype": dtype}
    profile |= {"crs": "EPSG:32633", "transform": TRANSFORM, **options}
    with tempfile.TemporaryDirectory() as folder, rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = Path(folder) / (
            "made.jp2" if profile["driver"] == "JP2OpenJPEG" else "made.tif"
        )  # the name decides, too
        with rasterio.open(path, "w", **profile) as target:
            for band in range(bands):
                target.write(scene(dtype), band + 1)
            if mask:
                target.write_mask(scene("uint8") > 100)
            if overviews:
                target.build_overviews([2], rasterio.enums.Resampling.nearest)
        return path.read_bytes()


def tiff(
    blocks: list[bytes],
    tags: dict[int, Any],
    *,
    big: bool = False,
    order: str = "<",
    extra: list[tuple[int, int, int, bytes]] | None = None,
    next_directory: int = 0,
) -> bytes:
    """A TIFF put together by hand: blocks, then one directory.

    Args:
        blocks: Packed tiles of 64 × 64 pixels.
        tags: Tag → number, several numbers, or (type, bytes); they replace those of one band of uint16 in tiles. None
            leaves one out.
        big: BigTIFF.
        order: "<" or ">".
        extra: (tag, type, count, value field) put behind all others, in this order.
        next_directory: Where the next directory is said to be.
    """
    start, offsets = 16 if big else 8, []
    body = bytearray()
    for block in blocks:
        offsets.append(start + len(body))
        body += block + b"\0" * (len(block) % 2)
    all_tags: dict[int, Any] = {
        256: SHAPE[1], 257: SHAPE[0], 258: 16, 259: 1, 262: 1, 277: 1, 284: 1, 322: 64, 323: 64,
        324: offsets, 325: [len(block) for block in blocks], 339: 1, **GEO, **tags,
    }  # fmt: skip
    entries = []
    room = 8 if big else 4
    for tag, value in sorted(all_tags.items()):
        if value is None:
            continue
        if isinstance(value, tuple):
            kind, data = value
        else:
            numbers = value if isinstance(value, list) else [value]
            kind = 3 if max(numbers) < 65536 and tag not in (324, 325) else 4
            data = struct.pack(f"{order}{len(numbers)}{_FORMS[kind]}", *numbers)
        count = len(data) // _SIZES[kind]
        if len(data) > room:
            at = start + len(body)
            body += data + b"\0" * (len(data) % 2)
            data = struct.pack(order + ("Q" if big else "I"), at)
        entries.append((tag, kind, count, data.ljust(room, b"\0")))
    entries += extra or []
    at = start + len(body)
    form = order + ("HHQ8s" if big else "HHI4s")
    directory = struct.pack(order + ("Q" if big else "H"), len(entries))
    directory += b"".join(struct.pack(form, *entry) for entry in entries)
    directory += struct.pack(order + ("Q" if big else "I"), next_directory)
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(f"{order}HHHQ", 43, 8, 0, at) if big else struct.pack(f"{order}HI", 42, at)
    return mark + head + bytes(body) + directory


def tiles(pixels: np.ndarray, pack: Callable[[np.ndarray], bytes] = lambda tile: tile.tobytes()) -> list[bytes]:
    padded = np.pad(pixels, [(0, -size % 64) for size in pixels.shape], mode="edge")
    return [
        pack(np.ascontiguousarray(padded[y : y + 64, x : x + 64]))
        for y in range(0, padded.shape[0], 64)
        for x in range(0, padded.shape[1], 64)
    ]


def _zstd(tile: np.ndarray) -> bytes:
    return bytes(imagecodecs.zstd_encode(tile.tobytes()))


def _delta_zstd(tile: np.ndarray) -> bytes:
    return _zstd(imagecodecs.delta_encode(tile, axis=-1))


@functools.cache
def good_files() -> dict[str, bytes]:
    """Files that are read; each name says how one is packed."""
    files: dict[str, bytes] = {}
    for compress in ("none", "deflate", "lzw", "zstd"):
        for dtype in ("uint8", "uint16", "int16", "float32"):
            predictors = (1,) if compress == "none" else (1, 3 if dtype == "float32" else 2)
            for predictor in predictors:
                options = {} if compress == "none" else {"compress": compress, "predictor": predictor}
                files[f"tiles-{compress}-{dtype}-{predictor}"] = written(dtype, **TILED, **options)
        options = {} if compress == "none" else {"compress": compress}
        files[f"strips-{compress}"] = written("uint16", **options)
        files[f"big-{compress}"] = written("uint16", **TILED, **options, BIGTIFF="YES")
        files[f"mm-{compress}"] = written("uint16", **TILED, **options, ENDIANNESS="BIG")
        files[f"cog-{compress}"] = written(
            "uint16", driver="COG", blocksize=64, overview_resampling="nearest", **options
        )
    for compress, dtype in (
        ("packbits", "uint16"), ("lzma", "uint16"), ("jpeg", "uint8"),
        ("lerc", "float32"), ("lerc", "uint16"), ("lerc_deflate", "float32"), ("lerc_zstd", "float32"),
    ):  # fmt: skip
        files[f"tiles-{compress}-{dtype}"] = written(dtype, **TILED, compress=compress)
        files[f"strips-{compress}-{dtype}"] = written(dtype, compress=compress)
    files["nodata"] = written("int16", **TILED, compress="deflate", nodata=901)
    files["mask"] = written("uint8", **TILED, compress="deflate", mask=True)
    files["overviews"] = written("uint16", **TILED, compress="zstd", predictor=2, overviews=True)
    files["bits-12"] = written("uint16", **TILED, compress="deflate", nbits=12)
    files["hand-zstd"] = tiff(tiles(scene("uint16"), _delta_zstd), {259: 50000, 317: 2})
    files["hand-big"] = tiff(tiles(scene("uint16"), _zstd), {259: 50000, 324: None} | _long8(scene("uint16")), big=True)
    files["white-is-zero"] = tiff(tiles(scene("uint16")), {262: 0})
    for name, reversible in (("jp2", "yes"), ("jp2-lossy", "no")):
        for dtype in ("uint8", "uint16"):
            files[f"{name}-{dtype}"] = written(
                dtype, driver="JP2OpenJPEG", quality=100 if reversible == "yes" else 20, reversible=reversible,
                blockxsize=64, blockysize=64,
            )  # fmt: skip
    files["j2k"] = _codestream(files["jp2-uint16"])  # it states no place: that is in a file beside it
    return files


def _long8(pixels: np.ndarray) -> dict[int, Any]:
    """Offsets of a BigTIFF in eight bytes each."""
    at, offsets = 16, []
    for block in tiles(pixels, _zstd):
        offsets.append(at)
        at += len(block) + len(block) % 2
    return {324: (16, struct.pack(f"<{len(offsets)}Q", *offsets))}


def _codestream(jp2: bytes) -> bytes:
    return jp2[jp2.index(b"\xff\x4f\xff\x51") :]


@functools.cache
def hostile_files() -> dict[str, bytes]:
    """Files that lie, made by hand; an error, or GDAL's pixels."""
    pixels = scene("uint16")
    plain, zstd, delta = tiles(pixels), tiles(pixels, _zstd), tiles(pixels, _delta_zstd)
    sizes = [len(block) for block in plain]
    xml = "<GDALMetadata><Item name='{}' domain='IMAGE_STRUCTURE'>{}</Item></GDALMetadata>\0"
    files = {
        "predictor-0": tiff(delta, {259: 50000, 317: 0}),
        "predictor-0-of-four-bytes": tiff(delta, {259: 50000, 317: (4, b"\0\0\0\0")}),
        "predictor-of-two-values": tiff(delta, {259: 50000, 317: [2, 1]}),
        "predictor-of-one-byte": tiff(delta, {259: 50000, 317: (1, b"\2")}),
        "predictor-signed": tiff(delta, {259: 50000, 317: (8, b"\2\0")}),
        "predictor-twice": tiff(delta, {259: 50000, 317: 2}, extra=[(317, 3, 1, b"\1\0\0\0")]),
        "predictor-behind-all": tiff(delta, {259: 50000}, extra=[(317, 3, 1, b"\2\0\0\0")]),
        "predictor-unpacked": tiff(plain, {317: 2}),
        "predictor-4": tiff(delta, {259: 50000, 317: 4}),
        "predictor-3-of-whole-numbers": tiff(delta, {259: 50000, 317: 3}),
        "bits-reversed": tiff(plain, {266: 2}),
        "bits-reversed-zstd": tiff(zstd, {259: 50000, 266: 2}),
        "bits-reversed-0": tiff(plain, {266: 0}),
        "signed": tiff(plain, {339: 2}),
        "void": tiff(plain, {339: 4}),
        "sample-format-0": tiff(plain, {339: 0}),
        "half-floats": tiff(plain, {339: 3}),
        "complex": tiff(plain, {339: 5}),
        "bits-12": tiff(plain, {258: 12}),
        "bits-17": tiff(plain, {258: 17}),
        "bits-of-two-bands": tiff(plain, {258: [16, 8]}),
        "two-bands": tiff(plain, {277: 2}),
        "planar-2": tiff(plain, {284: 2}),
        "planar-0": tiff(plain, {284: 0}),
        "upside-down": tiff(plain, {274: 3}),
        "deep-tiles": tiff(plain, {32998: 2}),
        "deep-image": tiff(plain, {32997: 2}),
        "extra-samples": tiff(plain, {338: 1}),
        "colours-of-water": tiff(plain, {262: 32844}),
        "colours-separated": tiff(plain, {262: 5}),
        "tile-of-100": tiff(plain, {322: 100}),
        "tile-of-0": tiff(plain, {322: 0}),
        "tile-of-2-31": tiff(plain, {322: 1 << 31, 323: 1 << 31}),
        "width-0": tiff(plain, {256: 0}),
        "width-huge": tiff(plain, {256: 0xFFFFFFFF}),
        "strips-and-tiles": tiff(plain, {278: 64, 273: [8, 8, 8], 279: [9, 9, 9]}),
        "sizes-absent": tiff(plain, {325: None}),
        "offsets-absent": tiff(plain, {324: None}),
        "offsets-too-few": tiff(plain, {324: [8, 8]}),
        "offsets-too-many": tiff(plain, {324: [8] * 40}),
        "offsets-all-one": tiff(plain, {324: [8] * len(plain)}),
        "offsets-0": tiff(plain, {324: [0] * len(plain)}),
        "offsets-beyond": tiff(plain, {324: [0xFFFFFF00] * len(plain)}),
        "offsets-on-the-header": tiff(zstd, {259: 50000, 324: [4] * len(plain)}),
        "sizes-0": tiff(plain, {325: [0] * len(plain)}),
        "sizes-1": tiff(plain, {325: [1] * len(plain)}),
        "sizes-huge": tiff(plain, {325: [0x7FFFFFFF] * len(plain)}),
        "sizes-huge-zstd": tiff(zstd, {259: 50000, 325: [0x7FFFFFFF] * len(plain)}),
        "sizes-too-large": tiff(plain, {325: [size + 2 for size in sizes]}),
        "sizes-swapped-zstd": tiff(zstd, {259: 50000, 325: [len(block) for block in reversed(zstd)]}),
        "offsets-signed": tiff(plain, {324: (9, struct.pack(f"<{len(plain)}i", *[-8] * len(plain)))}),
        "counts-huge": tiff(plain, {324: None}, extra=[(324, 4, 0x40000000, b"\x08\0\0\0")]),
        "next-is-itself": _loop(tiff(plain, {})),
        "sub-directory-is-itself": _loop(tiff(plain, {330: (4, b"\0\0\0\0")}), sub=True),
        "metadata-compression": tiff(zstd, {259: 50000, 42112: (2, xml.format("COMPRESSION", "DEFLATE").encode())}),
        "metadata-predictor": tiff(zstd, {259: 50000, 42112: (2, xml.format("PREDICTOR", "2").encode())}),
        "metadata-bits": tiff(plain, {42112: (2, xml.format("NBITS", "4").encode())}),
        "metadata-interleave": tiff(plain, {42112: (2, xml.format("INTERLEAVE", "PIXEL").encode())}),
        "nodata-of-nothing": tiff(plain, {42113: (2, b"1e999\0")}),
        "nodata-nan": tiff(plain, {42113: (2, b"nan\0")}),
        "zstd-cut": tiff([block[: len(block) // 2] for block in zstd], {259: 50000}),
        "zstd-twice": tiff([block + block for block in zstd], {259: 50000}),
        "deflate-of-zstd": tiff(zstd, {259: 8}),
        "lzw-of-before-1989": tiff([b"\x00\x01" + b"\x12\x34" * 50] * len(plain), {259: 5}),
        # CLEAR, a code of no entry, the next entry: its length and place are whatever the memory held
        "lzw-of-an-absent-entry": tiff([bytes.fromhex("804b20501010") + bytes(8)] * len(plain), {259: 5}),
        "lzw-of-nothing": tiff([b"\x80\x40\x40"] * len(plain), {259: 5}),
        "jxl": tiff(tiles(pixels, lambda tile: bytes(imagecodecs.jpegxl_encode(tile))), {259: 50002}),
        "webp": tiff(tiles(scene("uint8"), _webp), {259: 50001, 258: 8}),
        "webp-three": tiff(tiles(scene("uint8"), _webp), {259: 50001, 258: [8, 8, 8], 277: 3, 262: 2, 339: [1, 1, 1]}),
        "webp-cut": tiff([block[:90] for block in tiles(scene("uint8"), _webp)], {259: 50001, 258: 8}),
        "jpeg-cut": cut_blocks(written("uint8", **TILED, compress="jpeg")),
        "lerc-cut": cut_blocks(written("float32", **TILED, compress="lerc")),
        "lerc-zstd-cut": cut_blocks(written("float32", **TILED, compress="lerc_zstd")),
        "deflate-cut": cut_blocks(written("uint16", **TILED, compress="deflate")),
        "packbits-cut": cut_blocks(written("uint16", **TILED, compress="packbits")),
        "lzw-cut": cut_blocks(written("uint16", **TILED, compress="lzw")),
        "big-many-tags": b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 8 + b"\0" * 200,
        "directory-nowhere": b"II*\0\xff\xff\xff\xff",
        "directory-on-the-header": b"II*\0\0\0\0\0" + b"\0" * 100,
    }
    jp2 = good_files()["jp2-uint16"]
    for share in (0.99, 0.9, 0.7, 0.5, 0.3):
        files[f"jp2-cut-{share}"] = jp2[: int(len(jp2) * share)]
        files[f"j2k-cut-{share}"] = _codestream(jp2)[: int(len(_codestream(jp2)) * share)]
    return files


def _webp(tile: np.ndarray) -> bytes:
    return bytes(imagecodecs.webp_encode(np.stack([tile] * 3, axis=-1), lossless=True))


def _loop(data: bytes, *, sub: bool = False) -> bytes:
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    changed = bytearray(data)
    place = at + 2 + 12 * count
    if sub:
        place = next(at + 2 + 12 * n + 8 for n in range(count) if data[at + 2 + 12 * n :][:2] == b"\x4a\x01")
    struct.pack_into("<I", changed, place, at)
    return bytes(changed)


def cut_blocks(data: bytes) -> bytes:
    """A classic TIFF whose tiles are said to be a third shorter than they are."""
    changed = bytearray(data)
    for place, tag, kind, count, value in entries_of(data):
        if tag == 325:
            size = _SIZES[kind]
            at = place + 8 if count * size <= 4 else value
            for number in range(count):
                form = "<" + _FORMS[kind]
                (was,) = struct.unpack_from(form, data, at + number * size)
                struct.pack_into(form, changed, at + number * size, was * 2 // 3)
    return bytes(changed)


def moved_table(data: bytes, tags: tuple[int, ...], place: int | None = None, *, kind: int | None = None) -> bytes:
    """A TIFF of either byte order whose first directory states another place or type for the values of some tags."""
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    changed = bytearray(data)
    for number in range(count):
        entry = at + (8 + 20 * number if big else 2 + 12 * number)
        if struct.unpack_from(f"{order}H", data, entry)[0] in tags:
            if place is not None:
                struct.pack_into(order + ("Q" if big else "I"), changed, entry + (12 if big else 8), place)
            if kind is not None:
                struct.pack_into(f"{order}H", changed, entry + 2, kind)
    assert changed != data
    return bytes(changed)


def entries_of(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """(place, tag, type, count, value field) of the first directory of a little-endian classic or BigTIFF."""
    big = data[:4] == b"II+\0"
    if data[:4] != b"II*\0" and not big:
        return []
    try:
        (at,) = struct.unpack_from("<Q", data, 8) if big else struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<Q" if big else "<H", data, at)
        step, first = (20, at + 8) if big else (12, at + 2)
        return [
            (first + step * n, *struct.unpack_from("<HHQQ" if big else "<HHII", data, first + step * n))
            for n in range(min(count, 100))
        ]
    except struct.error:
        return []


# Mutations

_BYTES = (0, 1, 2, 3, 4, 5, 8, 16, 0x7F, 0x80, 0xFE, 0xFF)
_NUMBERS = (0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 32, 64, 255, 256, 4096, 32767, 32768, 65535, 1 << 20, (1 << 31) - 1,
            1 << 31, (1 << 32) - 1, 32773, 32946, 34712, 34887, 34925, 50000, 50001, 50002)  # fmt: skip
_TAGS = (254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 292, 317, 320, 322, 323, 324,
         325, 330, 338, 339, 340, 341, 347, 530, 532, 32997, 32998, 42112, 42113, 50674, 34735, 33550)  # fmt: skip


def mutated(number: int) -> tuple[str, bytes]:
    """The file of a number: what it was made of, and its bytes."""
    rng = random.Random(number)
    files = good_files() | hostile_files()
    name = rng.choice(sorted(good_files()) if rng.random() < 0.8 else sorted(files))
    data = bytearray(files[name])
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(_CHANGES)
        change(rng, data, files)
        done.append(change.__name__.strip("_"))
        if len(data) < 8:
            break
    return f"{name}: {', '.join(done)}", bytes(data)


def _place(rng: random.Random, data: bytearray) -> int:
    """Anywhere, but more often where the file describes itself."""
    if not data:
        return 0
    if rng.random() < 0.6:
        if entries := entries_of(bytes(data)):
            place, _, kind, count, value = rng.choice(entries)
            size = _SIZES.get(kind, 1) * count
            if size > 8 and value < len(data) and rng.random() < 0.5:
                return min(len(data) - 1, value + rng.randrange(min(size, 4096)))
            return min(len(data) - 1, place + rng.randrange(12))
        marks = [found.start() for found in re.finditer(rb"\xff[\x4f-\x5f\x90\x93]|jp2[hc]|ihdr", bytes(data[:4000]))]
        if marks and rng.random() < 0.8:
            return min(len(data) - 1, rng.choice(marks) + rng.randrange(48))
        return rng.randrange(min(len(data), 400))
    return rng.randrange(len(data))


def _flip(rng: random.Random, data: bytearray, _: Any) -> None:
    for _n in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _set_byte(rng: random.Random, data: bytearray, _: Any) -> None:
    if data:
        data[_place(rng, data)] = rng.choice(_BYTES)


def _set_number(rng: random.Random, data: bytearray, _: Any) -> None:
    form = rng.choice(["<H", "<I", "<Q", ">H", ">I"])
    at = _place(rng, data)
    if at + struct.calcsize(form) <= len(data):
        struct.pack_into(form, data, at, rng.choice(_NUMBERS) % (1 << 8 * struct.calcsize(form)))


def _cut(rng: random.Random, data: bytearray, _: Any) -> None:
    del data[rng.randrange(len(data)) if data and rng.random() < 0.5 else max(0, len(data) - rng.randrange(1, 400)) :]


def _edit_tag(rng: random.Random, data: bytearray, _: Any) -> None:
    entries = entries_of(bytes(data))
    if not entries:
        return _set_number(rng, data, _)
    big = data[:4] == b"II+\0"
    place, tag, kind, count, value = rng.choice(entries)
    what = rng.random()
    if what < 0.2:
        tag = rng.choice(_TAGS)
    elif what < 0.35:
        kind = rng.choice((*_SIZES, 0, 19, 255))
    elif what < 0.5:
        count = rng.choice((count + 1, max(0, count - 1), *_NUMBERS))
    elif what < 0.9:
        value = rng.choice((value ^ 1 << rng.randrange(32), value + 1, max(0, value - 1), *_NUMBERS))
    else:  # twice, or out of order
        _, tag, kind, count, value = rng.choice(entries)
    form, most = ("<HHQQ", 1 << 64) if big else ("<HHII", 1 << 32)
    if place + struct.calcsize(form) <= len(data):
        struct.pack_into(form, data, place, tag, kind, count % most, value % most)
    return None


def _swap_blocks(rng: random.Random, data: bytearray, _: Any) -> None:
    for _, tag, kind, count, value in entries_of(bytes(data)):
        size = _SIZES.get(kind, 4)
        if (
            tag in (273, 324, 279, 325)
            and 1 < count < 10_000
            and value + count * size <= len(data)
            and size * count > 8
        ):
            one, two = (value + size * rng.randrange(count) for _ in "ab")
            data[one : one + size], data[two : two + size] = data[two : two + size], data[one : one + size]
            if rng.random() < 0.5:
                return


def _splice(rng: random.Random, data: bytearray, files: dict[str, bytes]) -> None:
    other = files[rng.choice(sorted(files))] if rng.random() < 0.5 else bytes(data)
    if not other or not data:
        return
    start, size, at = rng.randrange(len(other)), rng.choice((2, 12, 100, 2000)), _place(rng, data)
    part = other[start : start + size]
    data[at : at + (len(part) if rng.random() < 0.9 else 0)] = part


def _remove(rng: random.Random, data: bytearray, _: Any) -> None:
    at = _place(rng, data)
    size = rng.choice((1, 2, 4, 12, 100))
    if rng.random() < 0.7:  # the rest stays where it is
        data[at : at + size] = b"\0" * len(data[at : at + size])
    else:
        del data[at : at + size]


def _head(rng: random.Random, data: bytearray, _: Any) -> None:
    if len(data) >= 16:
        data[rng.choice((2, 4, 4, 5, 6, 8, 9, 12))] = rng.choice((*_BYTES, rng.randrange(256)))


_CHANGES = (_flip, _set_byte, _set_number, _cut, _edit_tag, _edit_tag, _edit_tag, _swap_blocks,
            _splice, _remove, _head)  # fmt: skip
