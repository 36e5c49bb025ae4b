"""Bytes that planning has read: bounded, of one version of a file, and lent to another process."""

from __future__ import annotations

import pickle
import time

import numpy as np

from ingest.raster.kept import KeptBytes, KeptPixels
from ingest.raster.ranges import Head, HeadCache


def head(name: str, *, etag: str | None = "a", size: int = 1000, until: float | None = None) -> Head:
    return Head(f"http://x/{name}", b"0123456789", size, etag, True, HeadCache.deadline() if until is None else until)


def test_parts_belong_to_one_version() -> None:
    kept, first, second = KeptBytes(), head("a"), head("a", etag="b")
    kept.keep_head("a", first)
    kept.keep_part("a", first.version, 100, b"abc")
    kept.keep_part("a", second.version, 200, b"other")
    assert kept.parts("a", first) == ((100, b"abc"),)
    kept.keep_head("a", head("a"))
    assert kept.parts("a", first) == ((100, b"abc"),), "the same version, fetched again"
    assert kept.parts("a", second) == ()
    assert kept.head("a") is None, "what is known of a replaced file is forgotten"
    assert kept.nbytes == 0


def test_a_file_without_versions_keeps_its_head_alone() -> None:
    kept, plain = KeptBytes(), head("a", etag=None)
    kept.keep_head("a", plain)
    kept.keep_part("a", plain.version, 100, b"abc")
    assert (kept.head("a"), kept.parts("a", plain), kept.nbytes) == (plain, (), 10)


def test_a_head_that_is_the_whole_file_or_is_too_old_is_not_used() -> None:
    kept = KeptBytes()
    kept.keep_head("a", head("a", size=10))
    assert kept.head("a") is None
    old = head("b", until=time.monotonic() - 1)
    kept.keep_head("b", old)
    kept.keep_part("b", old.version, 50, b"abc")
    assert kept.head("b") is None, "the server is asked again"
    assert kept.parts("b", head("b")) == ((50, b"abc"),), "and what it states decides about the rest"


def test_the_files_used_least_recently_make_room() -> None:
    kept = KeptBytes(60)
    for name in "abc":
        kept.keep_head(name, head(name))
    kept.keep_part("b", head("b").version, 100, bytes(35))
    assert [name for name in "abc" if kept.head(name)] == ["b", "c"]
    assert kept.nbytes == 55
    kept.keep_part("b", head("b").version, 200, bytes(100))
    assert kept.nbytes <= 60, "also by one file that is too large"
    kept.clear()
    assert kept.nbytes == 0


def test_what_is_known_is_lent_to_another_process() -> None:
    ours, theirs = KeptBytes(), KeptBytes()
    for name in "ab":
        ours.keep_head(name, head(name))
        ours.keep_part(name, head(name).version, 100, bytes(50))
    lent = pickle.loads(pickle.dumps(ours.lend(["a", "b", "a", "absent"], 90)))
    assert [(file.href, len(file.parts)) for file in lent] == [("a", 1), ("b", 0)], "heads, and parts up to a bound"
    assert [file.href for file in ours.lend(["a", "b"], 15)] == ["a"], "heads, too"
    theirs.borrow(lent)
    found = theirs.head("a")
    assert found is not None
    assert abs(found.until - head("a").until) < 5
    assert theirs.parts("a", head("a")) == ((100, bytes(50)),)
    assert ours.head("a") is not None, "they stay here until the run has ended"


def test_pixels_of_a_region_are_those_of_one_version_and_place() -> None:
    kept, image = KeptBytes(), np.arange(100, dtype=np.uint16).reshape(10, 10)
    kept.keep_pixels("a", KeptPixels(("a", "1"), (20, 30, 10, 10), image))
    found = kept.pixels("a", ("a", "1"), (22, 33, 4, 5))
    assert found is not None
    np.testing.assert_array_equal(found, image[2:6, 3:8])
    assert kept.pixels("a", ("a", "2"), (22, 33, 4, 5)) is None, "another version"
    for outside in ((19, 30, 2, 2), (20, 29, 2, 2), (20, 30, 11, 2), (20, 30, 2, 11)):
        assert kept.pixels("a", ("a", "1"), outside) is None
    kept.keep_head("a", head("a"))
    assert kept.nbytes == 10 + image.nbytes
    (lent,) = kept.lend(["a"], 1000)
    assert lent.pixels is not None
    assert kept.lend(["a"], 100)[0].pixels is None, "more than may be sent along"
    kept.drop("a")
    assert (kept.nbytes, kept.pixels("a", ("a", "1"), (20, 30, 1, 1))) == (0, None)
    theirs = KeptBytes()
    theirs.borrow([lent])
    assert theirs.pixels("a", ("a", "1"), (20, 30, 1, 1)) is not None


def test_a_file_whose_versions_cannot_be_told_apart_gives_no_pixels() -> None:
    kept = KeptBytes()
    kept.keep_pixels("a", KeptPixels(None, (0, 0, 2, 2), np.zeros((2, 2), np.uint8)))
    assert kept.pixels("a", None, (0, 0, 1, 1)) is None
