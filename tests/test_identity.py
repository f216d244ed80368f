"""Matching, as a table of small cases and as properties; contents are a few letters, so that they are often alike."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing_tailer.identity import Matching, lost, match
from billing_tailer.model import BlockReason, FileState, Gap, GapReason, Position, SeenFile, Verdict


@dataclass
class Disk:
    """What a scan sees: (path, content) by inode. The judge looks at the contents, as `files` does at real ones."""

    files: dict[int, tuple[str, bytes]]
    unreadable: frozenset[int] = frozenset()
    looks: list[tuple[int, int]] = field(default_factory=list)

    def seen(self) -> list[SeenFile]:
        return [SeenFile(path, 1, inode, len(content)) for inode, (path, content) in self.files.items()]

    def judge(self, position: Position, file: SeenFile) -> Verdict:
        self.looks.append((position.file_id, file.inode))
        if file.inode in self.unreadable:
            return Verdict.UNREADABLE
        content = self.files[file.inode][1]
        offset, head = position.committed_offset, position.head
        if len(content) < offset:
            return Verdict.PAST_END if content and head.startswith(content) else Verdict.SHRUNK
        if offset == 0 and len(content) < position.size_seen:
            return Verdict.SHRUNK
        if content[:offset] != head:
            return Verdict.DIFFERS
        return Verdict.CUT if len(content) < position.size_seen else Verdict.AGREES

    def head(self, file: SeenFile) -> bytes:
        return b"" if file.inode in self.unreadable else self.files[file.inode][1]

    def same_rest(self, position: Position, one: SeenFile, other: SeenFile) -> bool:
        rest = self.files[one.inode][1][position.committed_offset :]
        return self.files[other.inode][1][position.committed_offset :].startswith(rest)

    def is_prefix(self, one: SeenFile, other: SeenFile) -> bool:
        return self.files[other.inode][1].startswith(self.files[one.inode][1])


def known(
    file_id: int,
    committed: bytes,
    inode: int,
    path: str = "log",
    *,
    size: int | None = None,
    state: FileState = FileState.LIVE,
    blocked: BlockReason | None = None,
) -> Position:
    """A generation with these bytes committed, last seen at this inode and path with this size."""
    return Position(
        file_id=file_id,
        path=path,
        device=1,
        inode=inode,
        generation=1,
        previous_file_id=None,
        head=committed,
        committed_offset=len(committed),
        frontier_sha256=hashlib.sha256(committed).digest(),
        frontier_bytes=len(committed),
        size_seen=len(committed) if size is None else size,
        state=state,
        blocked_reason=blocked,
    )


def told(matching: Matching) -> dict[str, Any]:
    """A matching in inodes, without what is empty."""
    everything = {
        "kept": {file_id: file.inode for file_id, file in matching.kept.items()},
        "matched": {file_id: file.inode for file_id, file in matching.matched.items()},
        "copies": sorted(file.inode for file in matching.copies),
        "unread": sorted(file.inode for file in matching.unread),
        "new": sorted(file.inode for file in matching.new),
        "ended": matching.ended,
        "blocked": matching.blocked,
        "missing": sorted(matching.missing),
    }
    return {name: value for name, value in everything.items() if value}


def matched(
    positions: Iterable[Position],
    files: dict[int, tuple[str, bytes]],
    *,
    complete: bool = True,
    unreadable: Iterable[int] = (),
) -> dict[str, Any]:
    disk = Disk(files, frozenset(unreadable))
    return told(match(list(positions), disk.seen(), disk, complete=complete))


def gap(file_id: int, start: int, end: int | None, reason: GapReason) -> dict[int, Gap]:
    return {file_id: Gap(file_id, start, end, reason)}


# --- the rules, one by one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [True, False])
def test_first_sight(complete: bool) -> None:
    assert matched([], {7: ("log", b"ab"), 8: ("other", b"ab")}, complete=complete) == {"new": [7, 8]}
    assert matched([], {}, complete=complete) == {}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("content", [b"abc", b"abcdef"])
@pytest.mark.parametrize("path", ["log", "log.1"])
def test_same_file_keeps_its_id(complete: bool, content: bytes, path: str) -> None:
    """Untouched or grown, under its name or another one."""
    assert matched([known(1, b"abc", 7)], {7: (path, content)}, complete=complete) == {"kept": {1: 7}}


def test_rotation_by_rename() -> None:
    files = {7: ("log.1", b"abcd"), 8: ("log", b"x")}
    assert matched([known(1, b"abc", 7)], files) == {"kept": {1: 7}, "new": [8]}


def test_three_rotations_while_stopped() -> None:
    positions = [known(1, b"abc", 7), known(2, b"k", 6, "log.1"), known(3, b"m", 5, "log.2")]
    files = {7: ("log.3", b"abcd"), 6: ("log.4", b"k"), 5: ("log.5", b"m"), 9: ("log.2", b"x"), 4: ("log", b"")}
    assert matched(positions, files) == {"kept": {1: 7, 2: 6, 3: 5}, "new": [4, 9]}


@pytest.mark.parametrize("complete", [True, False])
def test_out_of_sight_is_missing(complete: bool) -> None:
    """CANNOT_SEE_IS_NOT_GONE: absence ends nothing, whatever the scan saw."""
    assert matched([known(1, b"abc", 7)], {}, complete=complete) == {"missing": [1]}
    assert matched([known(1, b"abc", 7, size=9)], {8: ("log", b"x")}, complete=complete) == {"missing": [1], "new": [8]}


@pytest.mark.parametrize(
    ("size", "end"),
    [(3, None), (9, 9)],
)
def test_truncated(size: int, end: int | None) -> None:
    """To nothing, or to other bytes: a new generation, and the unread rest of the old one is lost."""
    for content in (b"", b"x", b"ax"):
        found = matched([known(1, b"abc", 7, size=size)], {7: ("log", content)})
        assert found == {"new": [7], "ended": gap(1, 3, end, GapReason.TRUNCATED)}


def test_truncated_before_anything_was_committed() -> None:
    found = matched([known(1, b"", 7, size=50)], {7: ("log", b"ab")})
    assert found == {"new": [7], "ended": gap(1, 0, 50, GapReason.TRUNCATED)}
    assert matched([known(1, b"", 7, size=2)], {7: ("log", b"xy")}) == {"kept": {1: 7}}


def test_regrown() -> None:
    """Truncated and regrown past the offset looks like an append, but the committed bytes differ."""
    found = matched([known(1, b"abc", 7, size=9)], {7: ("log", b"xyzxyzxyz")})
    assert found == {"new": [7], "ended": gap(1, 3, 9, GapReason.REGROWN)}


def test_inode_reused() -> None:
    found = matched([known(1, b"abc", 7, "log.1", size=9)], {7: ("log", b"xyz")})
    assert found == {"new": [7], "ended": gap(1, 3, 9, GapReason.INODE_REUSED)}


@pytest.mark.parametrize("content", [b"a", b"ab"])
@pytest.mark.parametrize("complete", [True, False])
def test_offset_past_the_end_blocks(content: bytes, complete: bool) -> None:
    """FAIL_CLOSED: shorter than the offset with the same beginning is impossible, so that an operator must look."""
    found = matched([known(1, b"abc", 7)], {7: ("log", content), 8: ("log.2", b"x")}, complete=complete)
    assert found == {"blocked": {1: BlockReason.OFFSET_PAST_END}, "unread": [7], "new": [8]}


def test_a_blocked_file_that_agrees_again_is_kept() -> None:
    blocked = known(1, b"abc", 7, state=FileState.BLOCKED, blocked=BlockReason.OFFSET_PAST_END)
    assert matched([blocked], {7: ("log", b"ab")}) == {"blocked": {1: BlockReason.OFFSET_PAST_END}, "unread": [7]}
    assert matched([blocked], {7: ("log", b"abcd")}) == {"kept": {1: 7}}


@pytest.mark.parametrize("complete", [True, False])
def test_unreadable_file_is_not_gone(complete: bool) -> None:
    found = matched([known(1, b"abc", 7, size=9)], {7: ("log", b"xyz")}, unreadable=[7], complete=complete)
    assert found == {"unread": [7]}


def test_moved_to_another_device() -> None:
    """Copied, restored, or its device has another number now: known again by its content."""
    assert matched([known(1, b"abc", 7)], {8: ("log", b"abcdef")}) == {"matched": {1: 8}}


def test_all_files_have_other_inodes() -> None:
    positions = [known(1, b"abc", 7), known(2, b"abx", 8, "log.1"), known(3, b"k", 9, "log.2")]
    files = {17: ("log", b"abcd"), 18: ("log.1", b"abx"), 19: ("log.2", b"kk")}
    assert matched(positions, files) == {"matched": {1: 17, 2: 18, 3: 19}}


def test_inodes_swapped() -> None:
    """Each stands where the other was: nobody is taken for the other, and nothing is lost."""
    positions = [known(1, b"abc", 7), known(2, b"xyz", 8)]
    assert matched(positions, {7: ("log", b"xyzz"), 8: ("log.1", b"abcc")}) == {"matched": {1: 8, 2: 7}}


def test_copytruncate() -> None:
    """The original is truncated: the copy inherits its file_id, and nothing is lost."""
    found = matched([known(1, b"abc", 7, size=9)], {7: ("log", b""), 8: ("log.1", b"abcdefghi")})
    assert found == {"matched": {1: 8}, "new": [7]}


def test_atomic_replace() -> None:
    """A new file was renamed over the old one, whose inode it does not have."""
    assert matched([known(1, b"abc", 7)], {8: ("log", b"xyz")}) == {"missing": [1], "new": [8]}
    assert matched([known(1, b"abc", 7)], {8: ("log", b"abcxyz")}) == {"matched": {1: 8}}


def test_several_candidates_block() -> None:
    files = {8: ("log", b"abcd"), 9: ("log.1", b"abce"), 10: ("log.2", b"x")}
    found = matched([known(1, b"abc", 7)], files)
    assert found == {"blocked": {1: BlockReason.AMBIGUOUS}, "copies": [8, 9], "new": [10]}


def test_ambiguity_spares_new_content_at_the_path() -> None:
    files = {7: ("log", b"xyz"), 8: ("log.1", b"abcd"), 9: ("log.2", b"abce")}
    found = matched([known(1, b"abc", 7, size=4)], files)
    assert found == {"blocked": {1: BlockReason.AMBIGUOUS}, "copies": [8, 9], "new": [7]}


def test_nothing_committed_is_no_content() -> None:
    """A generation at offset 0 is known by its locator only: it would agree with any file."""
    assert matched([known(1, b"", 7)], {8: ("log", b"abc")}) == {"missing": [1], "new": [8]}
    assert matched([known(1, b"", 7)], {7: ("log", b"abc")}) == {"kept": {1: 7}}


def told_of(positions: list[Position], files: list[SeenFile], disk: Disk, silent: Iterable[int] = ()) -> dict[str, Any]:
    found = match(positions, files, disk, complete=True, silent={(1, inode) for inode in silent})
    told_more = told(found)
    if found.replaced:
        told_more["replaced"] = [file.inode for file in found.replaced.values()]
    if found.longer:
        told_more["longer"] = [file.inode for file in found.longer]
    return told_more


def gone(inode: int, size: int) -> SeenFile:
    """A file that no directory shows any more."""
    return SeenFile("log", 1, inode, size, listed=False)


def test_a_file_that_is_only_held_open_counts_where_no_other_does() -> None:
    disk = Disk({8: ("log", b"abcd"), 9: ("log.1", b"abce")})
    lost_sight = [known(1, b"abc", 7)]
    assert told_of(lost_sight, [gone(8, 4)], disk) == {"matched": {1: 8}}
    assert told_of(lost_sight, [gone(8, 4), SeenFile("log.1", 1, 9, 4)], disk) == {"matched": {1: 9}, "new": [8]}
    both_gone = told_of(lost_sight, [gone(8, 4), gone(9, 4)], disk)
    assert both_gone == {"blocked": {1: BlockReason.AMBIGUOUS}, "copies": [8, 9]}


@pytest.mark.parametrize("content", [b"abc", b"abcX", b"abcdX"])
def test_a_longer_copy_of_a_listed_file_is_read_for_itself(content: bytes) -> None:
    """What it has beyond its original nobody else has; what both have are replays."""
    files = {7: ("log.1", b"abcd"), 8: ("log", content)}
    unread = "copies" if b"abcd".startswith(content) else "new"
    assert matched([known(1, b"abc", 7)], files) == {"kept": {1: 7}, unread: [8]}


def test_the_original_may_have_grown_since_it_was_listed() -> None:
    disk = Disk({7: ("log", b"abcde"), 8: ("copy", b"abcde")})
    seen = [SeenFile("log", 1, 7, 3), SeenFile("copy", 1, 8, 5)]
    assert told(match([known(1, b"abc", 7)], seen, disk, complete=True)) == {"kept": {1: 7}, "copies": [8]}


def test_a_longer_copy_replaces_a_file_that_is_gone_and_silent() -> None:
    disk = Disk({7: ("log", b"abcd"), 8: ("log", b"abcde"), 9: ("log", b"abcXe")})
    positions = [known(1, b"abc", 7)]
    original, copy = gone(7, 4), SeenFile("log", 1, 8, 5)
    assert told_of(positions, [original, copy], disk, silent=[7]) == {"matched": {1: 8}, "replaced": [7]}
    assert told_of(positions, [original, copy], disk) == {"kept": {1: 7}, "copies": [8], "longer": [8]}
    # another rest than the original's, which is still to be read: two files
    assert told_of(positions, [original, SeenFile("log", 1, 9, 5)], disk, silent=[7]) == {"kept": {1: 7}, "new": [9]}
    # beside the one that replaced it: a file of its own, too
    both = told_of(positions, [original, copy, SeenFile("log.1", 1, 9, 5)], disk, silent=[7])
    assert both == {"matched": {1: 8}, "replaced": [7], "new": [9]}


def test_one_of_several_longer_copies_replaces_a_file_that_is_gone() -> None:
    """The one at its path; where none is, all of them are read, and what they share are replays."""
    disk = Disk({7: ("log", b"abcd"), 8: ("log", b"abcde"), 9: ("log.1", b"abcdef")})
    positions, original = [known(1, b"abc", 7)], gone(7, 4)
    at_its_path = told_of(positions, [original, SeenFile("log", 1, 8, 5), SeenFile("log.1", 1, 9, 6)], disk, [7])
    assert at_its_path == {"matched": {1: 8}, "replaced": [7], "new": [9]}
    elsewhere = told_of(positions, [original, SeenFile("log.2", 1, 8, 5), SeenFile("log.1", 1, 9, 6)], disk, [7])
    assert elsewhere == {"kept": {1: 7}, "new": [8, 9]}
    # a copy that is itself gone replaces nothing, and is let go of once the other one has all of it
    between = told_of(positions, [original, gone(8, 5), SeenFile("log", 1, 9, 6)], disk, [7])
    assert between == {"matched": {1: 9}, "replaced": [7], "copies": [8]}


def zipped(inode: int, size: int) -> SeenFile:
    return SeenFile("log.1.gz", 1, inode, size, compressed=True)


def test_a_gzip_file_is_what_it_was_made_of() -> None:
    disk = Disk({7: ("log", b"abc"), 8: ("log.1.gz", b"abc"), 9: ("log.2.gz", b"abc"), 10: ("log.3.gz", b"abcd")})
    positions = [known(1, b"abc", 7)]
    # while the original is there it is a copy, and the original is gone only once it is silent
    assert told_of(positions, [SeenFile("log", 1, 7, 3), zipped(8, 3)], disk) == {"kept": {1: 7}, "copies": [8]}
    assert told_of(positions, [gone(7, 3), zipped(8, 3)], disk) == {"kept": {1: 7}, "copies": [8]}
    assert told_of(positions, [gone(7, 3), zipped(8, 3)], disk, [7]) == {"matched": {1: 8}, "replaced": [7]}
    assert told_of(positions, [zipped(8, 3)], disk) == {"matched": {1: 8}}
    # a file that can be written to comes first; of two where nothing is to be read, the first is as good
    plain = SeenFile("log", 1, 7, 3)
    assert told_of([known(1, b"abc", 6)], [plain, zipped(8, 3)], disk) == {"matched": {1: 7}, "copies": [8]}
    assert told_of(positions, [zipped(8, 3), zipped(9, 3)], disk) == {"matched": {1: 8}, "copies": [9]}
    assert told_of(positions, [zipped(8, 3), zipped(10, 4)], disk)["blocked"] == {1: BlockReason.AMBIGUOUS}


def test_bytes_that_were_seen_and_cut_away() -> None:
    """The rest of the generation is lost; what the file has now is read as another one, from 0."""
    found = matched([known(1, b"abc", 7, size=9)], {7: ("log", b"abcde")})
    assert found == {"ended": gap(1, 3, 9, GapReason.TRUNCATED), "new": [7]}


def test_a_copy_that_lacks_bytes_which_were_seen() -> None:
    """Of a file that was truncated: what stands in the copy is not lost."""
    found = matched([known(1, b"abc", 7, size=9)], {7: ("log", b""), 8: ("log.1", b"abcde")})
    assert found == {"ended": gap(1, 5, 9, GapReason.TRUNCATED), "new": [7, 8]}
    # a copy that was made earlier is not read while its original is there
    assert matched([known(1, b"abc", 7, size=5)], {7: ("log", b"abcde"), 8: ("copy", b"abc")}) == {
        "kept": {1: 7},
        "copies": [8],
    }


def test_what_cannot_be_compared_is_not_new() -> None:
    """It begins like a generation that is out of sight, and is looked at again later."""

    class Waiting(Disk):
        def judge(self, position: Position, file: SeenFile) -> Verdict:
            return Verdict.UNREADABLE

    disk = Waiting({8: ("log.1.gz", b"abcd"), 9: ("log", b"xyz")})
    found = match([known(1, b"abc", 7)], disk.seen(), disk, complete=True)
    assert told(found) == {"missing": [1], "unread": [8], "new": [9]}


def test_a_copy_is_not_read() -> None:
    files = {7: ("log", b"abcd"), 8: ("log.copy", b"abcd"), 9: ("log.save", b"abc")}
    assert matched([known(1, b"abc", 7)], files) == {"kept": {1: 7}, "copies": [8, 9]}


def test_a_copy_that_diverges_is_new() -> None:
    assert matched([known(1, b"abc", 7)], {7: ("log", b"abcd"), 8: ("copy", b"abX")}) == {"kept": {1: 7}, "new": [8]}


def test_a_file_beside_one_at_offset_0_is_no_copy() -> None:
    assert matched([known(1, b"", 7)], {7: ("log", b"ab"), 8: ("log.2", b"ab")}) == {"kept": {1: 7}, "new": [8]}


def test_copy_of_a_matched_file() -> None:
    """Two generations agree with one file: the one that is further gets it, and the other has lost nothing."""
    positions = [known(1, b"ab", 8, size=5), known(2, b"abc", 7)]
    files = {9: ("log", b"abcdef"), 8: ("log.1", b"")}
    assert matched(positions, files) == {"matched": {2: 9}, "ended": {1: None}, "new": [8]}


def test_no_gap_while_the_content_is_elsewhere() -> None:
    """Truncated, but another generation is the same content and further on: found again in this very scan."""
    positions = [known(1, b"ab", 7, size=9), known(2, b"abcd", 6, "log.1")]
    found = matched(positions, {7: ("log", b"x"), 8: ("log.1", b"abcdefghi")})
    assert found == {"matched": {2: 8}, "ended": {1: None}, "new": [7]}


def test_what_another_generation_has_may_be_its_own() -> None:
    """It may have parted from the truncated file before the bytes came that are lost: in doubt they are declared."""
    positions = [known(1, b"ab", 7, size=9), known(2, b"abcd", 8, "log.1")]
    found = matched(positions, {7: ("log", b"x"), 8: ("log.1", b"abcdefghi")})
    assert found == {"kept": {2: 8}, "ended": gap(1, 2, 9, GapReason.TRUNCATED), "new": [7]}


def test_generations_of_one_inode() -> None:
    """The newest generation has the file; what it replaced stays ended."""
    old = known(1, b"abc", 7, state=FileState.FINAL)
    assert matched([old, known(2, b"x", 7)], {7: ("log", b"xy")}) == {"kept": {2: 7}, "missing": [1]}
    assert matched([old, known(2, b"", 7)], {7: ("log", b"")}) == {"kept": {2: 7}, "missing": [1]}
    found = matched([old, known(2, b"xyz", 7, size=5)], {7: ("log", b"")})
    assert found == {"ended": gap(2, 3, 5, GapReason.TRUNCATED), "new": [7]}


def test_what_ended_is_known_again() -> None:
    """A final file that is seen again, with its content, is not new."""
    final = known(1, b"abc", 7, state=FileState.FINAL)
    assert matched([final], {7: ("log.1", b"abcd")}) == {"kept": {1: 7}}
    assert matched([final], {9: ("log.1", b"abcd")}) == {"matched": {1: 9}}
    assert matched([final, known(2, b"x", 7)], {7: ("log", b"x"), 9: ("log.1", b"abc")}) == {
        "kept": {2: 7},
        "matched": {1: 9},
    }


def test_what_ended_does_not_end_again() -> None:
    final = known(1, b"abc", 7, size=9, state=FileState.FINAL)
    for content in (b"", b"x", b"ab", b"xyzxyz"):
        assert matched([final], {7: ("log", content)}) == {"missing": [1], "new": [7]}
    # nor does it come back there, however long the file grows: its lost bytes are not those that stand there now
    assert matched([final], {7: ("log", b"abcdefghij")}) == {"missing": [1], "new": [7]}
    assert matched([final], {8: ("log", b"abcdefghij")}) == {"matched": {1: 8}}


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("content", [b"ab", b"x", b""])
def test_what_was_given_up_does_not_block_again(size: int, content: bytes) -> None:
    """`offsets accept-gap` of a file that is too short: what is left of it is new, with or without unread bytes."""
    blocked = known(1, b"abc", 7, size=size, state=FileState.BLOCKED, blocked=BlockReason.OFFSET_PAST_END)
    given_up = replace(blocked, state=FileState.FINAL, blocked_reason=None)
    assert matched([blocked], {7: ("log", b"ab")}) == {"blocked": {1: BlockReason.OFFSET_PAST_END}, "unread": [7]}
    found = matched([given_up], {7: ("log", content)})
    assert found == {"new": [7]} | ({"missing": [1]} if size > 3 else {})
    assert matched([given_up, known(2, content, 7)], {7: ("log", content)}) == {"missing": [1], "kept": {2: 7}}


def test_several_files_of_what_was_given_up_are_new() -> None:
    """`offsets accept-gap` of an ambiguous one: nothing waits for a decision any more."""
    blocked = known(1, b"abc", 7, state=FileState.BLOCKED, blocked=BlockReason.AMBIGUOUS)
    given_up = replace(blocked, state=FileState.FINAL, blocked_reason=None)
    files = {8: ("log.1", b"abcd"), 9: ("log.2", b"abce")}
    assert matched([blocked], files) == {"blocked": {1: BlockReason.AMBIGUOUS}, "copies": [8, 9]}
    assert matched([given_up], files) == {"missing": [1], "new": [8, 9]}
    assert matched([given_up], files, complete=False) == {"missing": [1], "unread": [8, 9]}
    # one of them alone goes on from it
    assert matched([given_up], {8: files[8]}) == {"matched": {1: 8}}


def test_what_ended_empty_claims_nothing() -> None:
    """Its unread bytes were declared lost: were it to take the file, they would be read as well as lost."""
    final = known(1, b"", 7, size=2, state=FileState.FINAL)
    assert matched([final], {7: ("log", b"abcd")}) == {"missing": [1], "new": [7]}
    found = matched([final, known(2, b"xyz", 7)], {7: ("log", b"abcd")})
    assert found == {"missing": [1], "new": [7], "ended": gap(2, 3, None, GapReason.REGROWN)}


def test_incomplete_scan_decides_nothing() -> None:
    """The original, or the file that inherits, may be where the scan could not look."""
    position = known(1, b"abc", 7, size=9)
    assert matched([position], {7: ("log", b"")}, complete=False) == {"unread": [7]}
    assert matched([position], {7: ("log", b""), 8: ("log.1", b"abcd")}, complete=False) == {"unread": [7, 8]}


def test_incomplete_scan_reads_nothing_again() -> None:
    """One mount came back with another device number while the other one is away: no file of it is new."""
    positions = [known(1, b"abc", 7), known(2, b"xyz", 8)]
    files = {17: ("log", b"abcd"), 19: ("log.2", b"k")}
    assert matched(positions, files, complete=False) == {"unread": [17], "missing": [1, 2], "new": [19]}
    assert matched(positions, files, complete=True) == {"matched": {1: 17}, "missing": [2], "new": [19]}


def test_incomplete_scan_knows_copies() -> None:
    found = matched([known(1, b"abc", 7)], {7: ("log", b"abc"), 8: ("copy", b"abcd")}, complete=False)
    assert found == {"kept": {1: 7}, "copies": [8]}


def test_copy_of_a_blocked_file_is_not_read() -> None:
    found = matched([known(1, b"abc", 7)], {7: ("log", b"ab"), 8: ("log.bak", b"abcd")})
    assert found == {"blocked": {1: BlockReason.OFFSET_PAST_END}, "unread": [7, 8]}


@pytest.mark.parametrize("complete", [True, False])
def test_copy_of_an_unreadable_file_is_not_read(complete: bool) -> None:
    files = {7: ("log", b"abcd"), 8: ("log.bak", b"abcd")}
    assert matched([known(1, b"abc", 7)], files, unreadable=[7], complete=complete) == {"unread": [7, 8]}


def test_no_gap_while_the_content_is_ambiguous() -> None:
    """Two generations of the same content, two files of it: what the one cannot decide, the other has not lost."""
    positions = [known(1, b"abc", 7, size=4), known(2, b"abc", 6, size=4)]
    files = {6: ("log", b""), 7: ("log.3", b""), 8: ("log.1", b"abcd"), 9: ("log.2", b"abce")}
    found = matched(positions, files)
    assert found == {"blocked": {1: BlockReason.AMBIGUOUS}, "copies": [8, 9], "ended": {2: None}, "new": [6, 7]}


def test_no_gap_while_the_content_is_in_a_blocked_file() -> None:
    positions = [known(1, b"abc", 7), known(2, b"ab", 6, size=2)]
    found = matched(positions, {7: ("log", b"ab"), 6: ("log.1", b"")})
    assert found == {"blocked": {1: BlockReason.OFFSET_PAST_END}, "unread": [7], "ended": {2: None}, "new": [6]}


def test_hot_path_looks_once() -> None:
    """With nothing out of the ordinary each file is compared with its own position only."""
    disk = Disk({inode: (f"log.{inode}", bytes([inode])) for inode in range(1, 50)})
    match([known(inode, bytes([inode]), inode) for inode in range(1, 50)], disk.seen(), disk, complete=True)
    assert sorted(disk.looks) == [(inode, inode) for inode in range(1, 50)]


@pytest.mark.parametrize(("size", "end"), [(3, None), (4, 4), (100, 100)])
def test_lost(size: int, end: int | None) -> None:
    position = known(1, b"abc", 7, size=size)
    assert lost(position, GapReason.REGROWN) == Gap(1, 3, end, GapReason.REGROWN)


# --- properties ----------------------------------------------------------------------------------------------------

contents = st.sampled_from([b"", b"a", b"ab", b"abc", b"abcd", b"abd", b"b", b"ba", b"xyz"])
inodes = st.integers(1, 6)
disks = st.builds(
    Disk,
    st.dictionaries(inodes, st.tuples(st.sampled_from(["log", "log.1", "log.2"]), contents), max_size=5),
    st.frozensets(inodes, max_size=2) | st.just(frozenset()),
)


@st.composite
def generations(draw: Callable[..., Any]) -> list[Position]:
    found = []
    for file_id in range(1, 1 + draw(st.integers(0, 5))):
        committed = draw(contents)
        state = draw(st.sampled_from(FileState))
        blocked = draw(st.sampled_from(BlockReason)) if state is FileState.BLOCKED else None
        size = len(committed) + draw(st.integers(0, 2))
        path = draw(st.sampled_from(["log", "log.1"]))
        found.append(known(file_id, committed, draw(inodes), path, size=size, state=state, blocked=blocked))
    return found


@given(generations(), disks, st.booleans())
def test_one_to_one(positions: list[Position], disk: Disk, complete: bool) -> None:
    """Every file is in exactly one list, every generation in at most one; only what agrees keeps a file_id."""
    found = match(positions, disk.seen(), disk, complete=complete)
    held = {**found.kept, **found.matched}
    files = Counter([*(f.inode for f in held.values()), *(f.inode for f in found.copies + found.unread + found.new)])
    assert files == Counter(disk.files.keys())
    ids = Counter([*found.kept, *found.matched, *found.ended, *found.blocked, *found.missing])
    assert set(ids) <= {position.file_id for position in positions}
    assert set(ids.values()) <= {1}
    by_id = {position.file_id: position for position in positions}
    for file_id, file in held.items():
        assert disk.judge(by_id[file_id], file) is Verdict.AGREES
    assert all(by_id[file_id].locator == file.locator for file_id, file in found.kept.items())
    assert all(by_id[file_id].committed_offset > 0 for file_id in found.matched)


@given(generations(), disks, st.booleans())
def test_absence_ends_nothing(positions: list[Position], disk: Disk, complete: bool) -> None:
    """CANNOT_SEE_IS_NOT_GONE: what is out of sight, unreadable, or final already, is not ended."""
    found = match(positions, disk.seen(), disk, complete=complete)
    by_id = {position.file_id: position for position in positions}
    for file_id, lost_part in found.ended.items():
        position = by_id[file_id]
        assert position.state is not FileState.FINAL
        assert position.inode in disk.files
        assert position.inode not in disk.unreadable
        content = disk.files[position.inode][1]
        cut = len(content) < position.size_seen
        assert cut or content[: position.committed_offset] != position.head or not position.head
        if lost_part is not None:
            assert lost_part.start_offset >= position.committed_offset
            others = {file.inode for other, file in found.kept.items()}
            agreeing = [file for file in disk.seen() if disk.judge(position, file) is Verdict.AGREES]
            assert position.committed_offset == 0 or {file.inode for file in agreeing} <= others


@given(generations(), disks)
def test_incomplete_scan(positions: list[Position], disk: Disk) -> None:
    found = match(positions, disk.seen(), disk, complete=False)
    assert (found.ended, found.matched) == ({}, {})


@given(generations(), disks, st.booleans())
def test_known_content_is_not_new(positions: list[Position], disk: Disk, complete: bool) -> None:
    """A file that agrees with what a generation has committed is read from its beginning only if it goes on otherwise,
    or if the generation is final, and nothing of it waits to be read."""
    found = match(positions, disk.seen(), disk, complete=complete)
    held = {**found.kept, **found.matched}
    for file in found.new:
        alike = {
            position.file_id: disk.judge(position, file)
            for position in positions
            if position.committed_offset > 0
            and not (
                position.state is FileState.FINAL and (position.file_id not in held or position.inode == file.inode)
            )
        }
        by_id = {position.file_id: position for position in positions}
        same = [
            disk.same_rest(by_id[file_id], file, held[file_id])
            for file_id, verdict in alike.items()
            if file_id in held and verdict in (Verdict.AGREES, Verdict.CUT)
        ]
        if Verdict.AGREES in alike.values():
            assert complete
            assert same
            assert not any(same)


@given(generations(), disks, st.booleans(), st.randoms(use_true_random=False))
def test_order_does_not_matter(positions: list[Position], disk: Disk, complete: bool, shuffle: random.Random) -> None:
    expected = told(match(positions, disk.seen(), disk, complete=complete))
    seen = disk.seen()
    shuffle.shuffle(seen)
    shuffle.shuffle(positions)
    assert told(match(positions, seen, disk, complete=complete)) == expected


def applied(positions: list[Position], found: Matching) -> list[Position]:
    """The generations once a matching was committed, as the follower does it."""
    after = []
    for position in positions:
        file = {**found.kept, **found.matched}.get(position.file_id)
        if position.file_id in found.ended:
            after.append(replace(position, state=FileState.FINAL, blocked_reason=None))
        elif position.file_id in found.blocked:
            reason = found.blocked[position.file_id]
            after.append(replace(position, state=FileState.BLOCKED, blocked_reason=reason))
        elif file is not None:
            size = max(position.size_seen, file.size)
            final = position.state is FileState.FINAL and file.size <= position.committed_offset
            state = FileState.FINAL if final else FileState.ROTATED
            after.append(
                replace(position, inode=file.inode, path=file.path, size_seen=size, state=state, blocked_reason=None)
            )
        else:
            after.append(position)
    next_id = max((position.file_id for position in positions), default=0) + 1
    return after + [
        known(file_id, b"", file.inode, file.path, size=file.size) for file_id, file in enumerate(found.new, next_id)
    ]


def settled(found: Matching) -> Mapping[str, Any]:
    return {name: value for name, value in told(found).items() if name in ("new", "ended", "matched")}


@given(generations(), disks)
def test_a_second_look_changes_nothing(positions: list[Position], disk: Disk) -> None:
    """While the files stay as they are, nothing is registered, ended or moved twice."""
    once = applied(positions, match(positions, disk.seen(), disk, complete=True))
    twice = match(once, disk.seen(), disk, complete=True)
    assert settled(twice) == {}
