"""Log files as writers, logrotate and accidents treat them, with a memory of everything that ever stood in them.

The memory is the oracle of the model test: it knows each *content* (what one file held until it was cut, rewritten or
removed), which lines of it a tailer must have read, and judges what is in the database at the end.
"""

import gzip
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from billing_tailer.model import BlockReason, FileState, Position
from tests.support.loglines import line
from tests.support.proof import assert_sound, count, outcomes, rows

CURRENT: Final = "audit.jsonl"
_CALL: Final = re.compile(rb'"litellm_call_id":"(call-\d+)"')
_LINE: Final = re.compile(
    rb'^\x00*\{"msec":(?:(?!"msec":).)*"litellm_call_id":"(call-\d+)"(?:(?!"msec":).)*\}$', re.MULTILINE
)
"""A sound one: what follows a cut in its line is a dead letter."""


@dataclass(eq=False)
class Content:
    """What one file holds, until something destroys a part of it. seen: its size at the last undisturbed look."""

    data: bytes = b""
    destroyed: bool = False
    seen: int = 0
    inode: int = 0
    copied_lines: int = 0  # which may legitimately be read a second time


@dataclass(eq=False)
class Node:
    """A file: its writer's descriptor, its names, what it holds, and the rest of a line that was half written."""

    fd: int
    content: Content
    names: set[str]
    rest: bytes = b""


@dataclass
class Judgement:
    """Lines or bytes, with words for each."""

    lost: int = 0
    doubled: int = 0
    undeclared: int = 0
    unsound: int = 0
    words: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Nothing is wrong."""
        return not self.words


def calls_in(data: bytes) -> set[str]:
    """Call ids of the complete and sound lines."""
    return {match.decode() for match in _LINE.findall(data[: data.rfind(b"\n") + 1])}


class World:
    """The files of one directory. Every action takes `pick` (which file) and `size` (how much); it may be a no-op."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.contents: list[Content] = []
        self.nodes: dict[str, Node] = {}
        self.must: set[str] = set()
        """Calls that stood in a readable file when a tailer had all the time in the world."""
        self._calls = itertools.count()
        self._names = itertools.count(1)
        self._create(CURRENT)

    def close(self) -> None:
        """Close the writers' descriptors."""
        for node in set(self.nodes.values()):
            os.close(node.fd)
        self.nodes.clear()

    # --- actions

    def append(self, pick: int, size: int) -> None:
        """Whole lines, behind the rest of a half one, also to rotated files."""
        node = self._node(pick)
        self._write(node, node.rest + self._lines(1 + size % 30, size))
        node.rest = b""

    def half(self, pick: int, size: int) -> None:
        """The beginning of a line, or the rest of one."""
        node = self._node(pick)
        if not node.rest:
            new = self._lines(1, size)
            node.rest = new[1 + size % (len(new) - 1) :]
            self._write(node, new[: len(new) - len(node.rest)])
            return
        rest, node.rest = node.rest, b""
        self._write(node, rest)

    def rotate(self, pick: int, size: int) -> None:
        """By rename, with a new file most of the time."""
        node = self.nodes.pop(CURRENT, None)
        if node is None:
            self._create(CURRENT, self._lines(1, size))
            return
        name = f"{CURRENT}.{next(self._names)}"
        (self.directory / CURRENT).rename(self.directory / name)
        node.names = (node.names - {CURRENT}) | {name}
        self.nodes[name] = node
        if pick % 4:
            self._create(CURRENT, self._lines(size % 3, size))

    def copytruncate(self, pick: int, size: int) -> None:
        """logrotate's, with a line behind it most of the time."""
        node = self.nodes.get(CURRENT)
        if node is None:
            return
        self._copy(node, f"{CURRENT}.{next(self._names)}")
        self._cut(node, 0)
        if pick % 4:
            self._write(node, self._lines(1 + size % 3, size))

    def truncate(self, pick: int, size: int) -> None:
        """To nothing."""
        self._cut(self._node(pick), 0)

    def truncate_to_the_middle(self, pick: int, size: int) -> None:
        """Anywhere."""
        node = self._node(pick)
        if node.content.data:
            self._cut(node, size % len(node.content.data))

    def regrow(self, pick: int, size: int) -> None:
        """Cut to nothing, and written beyond its old end."""
        node = self._node(pick)
        longer = len(node.content.data)
        self._cut(node, 0)
        new = b""
        while len(new) <= longer:
            new += self._lines(1 + size % 5, size)
        self._write(node, new)

    def delete(self, pick: int, size: int) -> None:
        """Unlink one name."""
        self._drop(self._name(pick))

    def recreate(self, pick: int, size: int) -> None:
        """The log removed and made anew, as a careless restart does."""
        if CURRENT in self.nodes:
            self._drop(CURRENT)
        self._create(CURRENT, self._lines(size % 12, size))

    def replace(self, pick: int, size: int) -> None:
        """Another file renamed over the log."""
        self._rename_over(self._create(".other", self._lines(1 + size % 30, size)))

    def replace_by_longer_copy(self, pick: int, size: int) -> None:
        """An editor's: a copy with more at its end, renamed over the log."""
        node = self.nodes.get(CURRENT)
        if node is None:
            return
        copy = self._copy(node, ".other")
        self._write(copy, copy.rest + self._lines(1 + size % 5, size))
        copy.rest = b""
        self._rename_over(copy)

    def rewrite_in_place(self, pick: int, size: int) -> None:
        """Another call's line in the place of the last complete one, of the same length."""
        node = self._node(pick)
        found = list(_CALL.finditer(node.content.data[: node.content.data.rfind(b"\n") + 1]))
        if not found:
            return
        at = found[-1].start(1)
        new = f"call-{next(self._calls):08d}".encode()
        before = node.content
        self._succeed(node, before.data[:at] + new + before.data[at + len(new) :])
        fd = os.open(self.directory / min(node.names), os.O_WRONLY)
        os.pwrite(fd, new, at)
        os.close(fd)

    def hole(self, pick: int, size: int) -> None:
        """Cut to nothing under a writer without O_APPEND, who goes on at his old offset."""
        node = self._node(pick)
        at = len(node.content.data)
        self._cut(node, 0)
        new = self._lines(1 + size % 3, size)
        node.content.data = bytes(at) + new
        fd = os.open(self.directory / min(node.names), os.O_WRONLY)
        os.pwrite(fd, new, at)
        os.close(fd)

    def link(self, pick: int, size: int) -> None:
        """A second name."""
        name = self._name(pick)
        node = self.nodes[name]
        other = f"{CURRENT}.{next(self._names)}"
        os.link(self.directory / name, self.directory / other)
        node.names.add(other)
        self.nodes[other] = node

    def gzip(self, pick: int, size: int) -> None:
        """A rotated file compressed, as logrotate does it."""
        name = self._name(pick)
        node = self.nodes[name]
        if name == CURRENT or len(node.names) > 1:
            return
        if pick % 4 == 0:  # nobody has read this when it goes
            self._write(node, node.rest + self._lines(1 + size % 3, size))
            node.rest = b""
        compressed = self.directory / f"{name}.gz"
        compressed.write_bytes(gzip.compress(node.content.data))
        self.must |= calls_in(node.content.data)
        self._drop(name)

    # --- what the oracle remembers

    def looked(self, positions: Iterable[Position]) -> set[int]:
        """A tailer has looked at everything, undisturbed; returns the inodes that it follows. What stands in a blocked
        file is nobody's until an operator decides."""
        blocked = [position for position in positions if position.state is FileState.BLOCKED]
        if any(position.blocked_reason is BlockReason.AMBIGUOUS for position in blocked):
            return set()  # whichever of the files it is
        contents = [node.content for node in self.nodes.values()]
        followed = {content.inode for content in contents} - {position.inode for position in blocked}
        for content in contents:
            if content.inode in followed:
                content.seen = len(content.data)
        return followed

    def read_through(self, positions: Iterable[Position]) -> None:
        """A tailer has had all the time it wanted: what stands there now must have been read, unless it is blocked."""
        followed = self.looked(positions)
        for node in self.nodes.values():
            if node.content.inode in followed:
                self.must |= calls_in(node.content.data)

    def judge(self, dsn: str, reasons: dict[str, list[str]]) -> Judgement:
        """Of a tailer that has read through. reasons: what it says of itself on /readyz."""
        found = Judgement()
        facts = {row["call_id"] for row in rows(dsn, "select call_id from usage_facts")}
        files = rows(dsn, "select * from tail_files order by file_id")
        self._judge_lost(facts, files, reasons, found)
        self._judge_doubled(dsn, facts, found)
        self._judge_undeclared(dsn, files, found)
        return found

    def _judge_lost(
        self, facts: set[str], files: list[dict[str, Any]], reasons: dict[str, list[str]], found: Judgement
    ) -> None:
        blocked = [file for file in files if file["state"] == "blocked"]
        ambiguous = any(file["blocked_reason"] == "ambiguous" for file in blocked)
        inodes = {int(file["inode"]) for file in blocked}
        told = " ".join(itertools.chain.from_iterable(reasons.values()))
        excused: set[str] = set()
        for node in set(self.nodes.values()):
            if ambiguous or node.content.inode in inodes or any(f"/{name}:" in told for name in node.names):
                excused |= calls_in(node.content.data)
        missing = self.must - facts - excused
        if missing:
            found.lost = len(missing)
            found.words.append(f"lost {sorted(missing)[:5]}, {len(missing)} in all; /readyz says {reasons}")

    def _judge_doubled(self, dsn: str, facts: set[str], found: Judgement) -> None:
        counts = outcomes(dsn)
        copied = sum(content.copied_lines for content in self.contents)
        found.doubled = max(0, counts.get("replayed", 0) - copied) + counts.get("conflict", 0)
        found.doubled += abs(counts.get("fact", 0) - count(dsn, "usage_facts"))
        written = set().union(*(calls_in(content.data) for content in self.contents))
        found.doubled += len(facts - written)
        if found.doubled:
            found.words.append(f"doubled or invented: {counts}, {copied} lines were copied, {len(facts)} facts")
        try:
            assert_sound(dsn)
        except AssertionError as error:
            found.unsound += 1
            found.words.append(f"unsound: {str(error).splitlines()[0]}")

    def _judge_undeclared(self, dsn: str, files: list[dict[str, Any]], found: Judgement) -> None:
        tiles: dict[int, list[dict[str, Any]]] = {file["file_id"]: [] for file in files}
        for tile in rows(dsn, "select file_id, start_offset, end_offset, sha256 from tail_batches order by 1, 2"):
            tiles[tile["file_id"]].append(tile)
            if not any(_holds(content, tile) for content in self.contents):
                found.unsound += 1
                found.words.append(f"these bytes stood in no file: {tile}")
        gaps = {row["file_id"] for row in rows(dsn, "select file_id from log_gaps")}
        for content in self.contents:
            if not content.destroyed or content.seen == 0:
                continue
            mine = [file for file in files if _is_of(content, file, tiles[file["file_id"]])]
            committed = max((int(file["committed_offset"]) for file in mine), default=0)
            # a generation may have gone on from this content in a copy of it
            committed = max([committed, *(self._covered(content, found_in) for found_in in tiles.values())])
            # a file of which nothing is committed is known by its inode alone, which another one may have had since
            if committed >= content.seen or committed == 0:
                continue
            if any(file["file_id"] in gaps or file["state"] in ("missing", "blocked") for file in mine):
                continue
            if self._stands(content, {int(file["inode"]) for file in mine if file["state"] != "final"}):
                continue
            found.undeclared += content.seen - committed
            found.words.append(f"{content.seen - committed} bytes were seen and destroyed undeclared, of {mine}")

    def _stands(self, content: Content, inodes: set[int]) -> bool:
        """Whether a copy, which a generation goes on in, has all that was seen: half a line there is not destroyed."""
        seen = content.data[: content.seen]
        return any(node.content.inode in inodes and node.content.data.startswith(seen) for node in self.nodes.values())

    def _covered(self, content: Content, tiles: list[dict[str, Any]]) -> int:
        """How much of a content the first rows of a generation account for, also in a copy of it that goes on."""
        held = list(itertools.takewhile(lambda tile: _holds(content, tile), tiles))
        end = int(held[-1]["end_offset"]) if held else 0
        rest = content.data[end : content.seen]
        for tile in tiles[len(held) : len(held) + 1]:
            if any(_holds(other, tile) and other.data[end : end + len(rest)] == rest for other in self.contents):
                return min(content.seen, int(tile["end_offset"]))
        return end

    # --- how it is done

    def _lines(self, number: int, size: int) -> bytes:
        pad = "y" * (0, 0, 300, 2500)[size % 4]
        return b"".join(line(next(self._calls), pad=pad) for _ in range(number))

    def _name(self, pick: int) -> str:
        """The log itself, more often than not."""
        names = sorted(self.nodes)
        if not names:
            self._create(CURRENT)
            return CURRENT
        return CURRENT if pick % 2 and CURRENT in self.nodes else names[pick // 2 % len(names)]

    def _node(self, pick: int) -> Node:
        return self.nodes[self._name(pick)]

    def _create(self, name: str, data: bytes = b"") -> Node:
        fd = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        node = Node(fd, Content(inode=os.fstat(fd).st_ino), {name})
        self.contents.append(node.content)
        self.nodes[name] = node
        self._write(node, data)
        return node

    def _write(self, node: Node, data: bytes) -> None:
        if data:
            os.write(node.fd, data)
            node.content.data += data

    def _cut(self, node: Node, size: int) -> None:
        self._succeed(node, node.content.data[:size])
        node.rest = b""
        os.ftruncate(node.fd, size)

    def _succeed(self, node: Node, data: bytes) -> None:
        """The file holds another content from now on, of which a part may be the old one's."""
        node.content.destroyed = True
        pairs = zip(node.content.data, data, strict=False)
        same = next((at for at, (old, new) in enumerate(pairs) if old != new), len(data))
        copied = data.count(b"\n", 0, same) + node.content.copied_lines
        node.content = Content(data, inode=node.content.inode, copied_lines=copied)
        self.contents.append(node.content)

    def _copy(self, node: Node, name: str) -> Node:
        copy = self._create(name, node.content.data)
        copy.rest = node.rest
        # with half a line, both writers may write the rest of it
        copied = node.content.data.count(b"\n") + bool(node.rest)
        copy.content.copied_lines = copied + node.content.copied_lines
        return copy

    def _drop(self, name: str) -> None:
        (self.directory / name).unlink()
        self._forget(name)

    def _forget(self, name: str) -> None:
        node = self.nodes.pop(name)
        node.names.discard(name)
        if not node.names:
            node.content.destroyed = True
            os.close(node.fd)

    def _rename_over(self, node: Node) -> None:
        (self.directory / ".other").rename(self.directory / CURRENT)
        if CURRENT in self.nodes:
            self._forget(CURRENT)
        del self.nodes[".other"]
        node.names = {CURRENT}
        self.nodes[CURRENT] = node


def _holds(content: Content, tile: dict[str, Any]) -> bool:
    part = content.data[tile["start_offset"] : tile["end_offset"]]
    whole = len(part) == tile["end_offset"] - tile["start_offset"]
    return whole and bool(hashlib.sha256(part).digest() == tile["sha256"])


def _is_of(content: Content, file: dict[str, Any], tiles: list[dict[str, Any]]) -> bool:
    """Whether a row of `tail_files` may be this content's generation."""
    if tiles:
        return all(_holds(content, tile) for tile in tiles)
    return int(file["inode"]) == content.inode


def actions() -> Iterator[str]:
    """The names of those that are to be tried with the product as it is."""
    yield from ("append", "half", "rotate", "copytruncate", "truncate", "truncate_to_the_middle", "regrow", "delete")
    yield from ("recreate", "replace", "replace_by_longer_copy", "rewrite_in_place", "link", "gzip", "hole")
