"""The content of gzip files, in order and in bounded memory: what a rotated log becomes.

Part of the room `files`: works on descriptors that others open. A gzip file does not say how long its content is, nor
can it be entered in the middle: it is read through once (`Archive.step`, a little at a time) before it is compared with
positions, and then again from its beginning to where reading goes on. Several members one after another are one
content, as `gzip -d` has it; NUL bytes behind the last member are padding.
"""

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Iterable

from billing_tailer.model import FRONTIER_BYTES_MAX, HEAD_BYTES_MAX, Position, Verdict

COMPRESSED_STEP_BYTES = 64 << 10
CONTENT_STEP_BYTES = 256 << 10
_GZIP = 16 + zlib.MAX_WBITS

ReadAt = Callable[[int, int], bytes]
"""(offset, bytes at most) -> compressed bytes. Raises OSError."""


class BrokenArchive(Exception):
    """Not a gzip file, damaged, or (as while it is written) not finished."""


class Content:
    """The content from `start` on, as far as it was asked for. Goes forward only."""

    def __init__(self, read_at: ReadAt) -> None:
        self._read_at = read_at
        self._at = 0
        self._member: zlib._Decompress | None = None
        self._members = 0
        self._input = b""
        self.start = 0
        self.buffer = b""
        self.ended = False
        """`buffer` ends where the content ends."""

    @property
    def end(self) -> int:
        """The offset behind the last byte that is there by now."""
        return self.start + len(self.buffer)

    @property
    def compressed_bytes_read(self) -> int:
        """How far the file has been read."""
        return self._at

    def take(self, bytes_max: int) -> bytes:
        """The next bytes, fewer than asked for at the end only. Raises BrokenArchive, OSError."""
        while len(self.buffer) < bytes_max and not self.ended:
            self.step()
        taken = self.buffer[:bytes_max]
        self.drop_before(self.start + len(taken))
        return taken

    def drop_before(self, offset: int) -> None:
        """Forget what lies before an offset."""
        dropped = min(max(0, offset - self.start), len(self.buffer))
        self.buffer = self.buffer[dropped:]
        self.start += dropped

    def step(self) -> None:
        """Append at most CONTENT_STEP_BYTES to the buffer. Raises BrokenArchive, OSError."""
        if not self._input:
            self._input = self._read_at(self._at, COMPRESSED_STEP_BYTES)
            self._at += len(self._input)
            if not self._input:
                if self._member is not None or not self._members:
                    raise BrokenArchive("it ends in the middle of the compressed data")
                self.ended = True
                return
        if self._member is None:
            if self._members:
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    return
            self._member = zlib.decompressobj(_GZIP)
            self._members += 1
        try:
            self.buffer += self._member.decompress(self._input, CONTENT_STEP_BYTES)
        except zlib.error as error:
            raise BrokenArchive(f"not gzip, or damaged: {error}") from None
        if self._member.eof:
            self._input, self._member = self._member.unused_data, None
        else:
            self._input = self._member.unconsumed_tail


class Archive:
    """What is known of one gzip file: nothing at first, then the size, head and frontiers of its content."""

    def __init__(self, signature: tuple[int, int]) -> None:
        """signature: size and mtime_ns of the file; with another one it is another archive."""
        self.signature = signature
        self.size = 0
        """Bytes of content; final once `ready`."""
        self.ready = False
        self.broken: str | None = None
        self.retry_at = math.inf
        """When to try again what is broken (monotonic seconds): at once if the file changes."""
        self.head = b""
        self.after_newline = 0
        """The offset behind the last newline."""
        self.bound: set[int] = set()
        """Generations that are being read from it: their frontier was verified by the last read."""
        self._frontiers: dict[int, bytes] = {}
        self._wanted: set[int] = set()
        self._asked = False
        self._digested: Content | None = None
        self._content: Content | None = None

    def is_unknown(self) -> bool:
        """Whether it has to be read through."""
        return not self.ready and self.broken is None

    # --- reading it through

    def step(self, read_at: ReadAt, wanted: Callable[[bytes], Iterable[int]]) -> None:
        """Read on a little. wanted: the offsets at which a frontier is asked for, by the head of the content."""
        if self._digested is None:
            self._digested = Content(read_at)
        content = self._digested
        seen = content.end
        try:
            content.step()
        except BrokenArchive as error:
            self.broken, self._digested = str(error), None
            return
        if not self._asked and (content.end >= HEAD_BYTES_MAX or content.ended):
            self.head, self._asked = content.buffer[:HEAD_BYTES_MAX], True
            self._wanted.update(wanted(self.head))
        for offset in [offset for offset in self._wanted if offset <= content.end]:
            self._wanted.remove(offset)
            self._frontiers[offset] = _frontier(content, offset)
        newline = content.buffer.rfind(b"\n", seen - content.start)
        if newline >= 0:
            self.after_newline = content.start + newline + 1
        if content.ended:
            self.size, self.ready, self._digested = content.end, True, None
            self._frontiers[self.size] = _frontier(content, self.size)
        elif self._asked:
            content.drop_before(content.end - FRONTIER_BYTES_MAX)

    def trust(self, read_at: ReadAt, position: Position) -> bool:
        """Whether it is, by its head and the length in its last bytes, what was committed to its end: then it need not
        be read through again after every start."""
        if position.committed_offset != position.size_seen or not position.committed_offset:
            return False
        content = Content(read_at)
        try:
            while content.end < HEAD_BYTES_MAX and not content.ended:
                content.step()
            length = read_at(self.signature[0] - 4, 4)
        except (BrokenArchive, OSError):
            return False
        if length != struct.pack("<I", position.size_seen & 0xFFFFFFFF):
            return False
        if content.buffer[: len(position.head)] != position.head:
            return False
        self.size, self.ready, self.head = position.size_seen, True, content.buffer[:HEAD_BYTES_MAX]
        self.after_newline = self.size
        self._frontiers = {position.committed_offset: position.frontier_sha256}
        return True

    # --- comparing and reading

    def judge(self, position: Position, *, own: bool) -> Verdict:
        """Compare the content with a position; UNREADABLE until it was read through. own: the position is at this
        file."""
        if not self.ready:
            return Verdict.UNREADABLE
        if own and position.committed_offset >= self.size:
            self._content = None  # there is nothing more to read
        if not self.head.startswith(position.head):
            shorter = self.size < position.committed_offset and position.head.startswith(self.head) and self.head
            return Verdict.PAST_END if shorter else Verdict.DIFFERS
        if self.size < position.committed_offset:
            return Verdict.PAST_END
        if not (own and position.file_id in self.bound) and position.committed_offset:
            frontier = self._frontiers.get(position.committed_offset)
            if frontier is None:
                self._again(position.committed_offset)
                return Verdict.UNREADABLE
            if frontier != position.frontier_sha256:
                return Verdict.DIFFERS
        return Verdict.CUT if self.size < position.size_seen else Verdict.AGREES

    def _again(self, offset: int) -> None:
        """Read it through once more, for a frontier that was not asked for."""
        self.ready, self._wanted = False, {*self._frontiers, offset}
        self._frontiers = {}

    def frontier(self, offset: int) -> bytes:
        """The frontier at an end of the content or an offset that was asked for. Raises KeyError."""
        return self._frontiers[offset]

    def read(self, read_at: ReadAt, offset: int, bytes_max: int, *, skip_bytes_max: int) -> bytes | None:
        """The content from an offset on; None where that is more than `skip_bytes_max` ahead: ask again. Raises OSError
        where the content is broken."""
        if self._content is None or self._content.start > offset:
            self._content = Content(read_at)
        content, skipped_to = self._content, self._content.end + skip_bytes_max
        try:
            # to its very end, where its checksum stands, before the last bytes are believed
            while not content.ended and (content.end < offset + bytes_max or content.end >= self.size):
                content.step()
                content.drop_before(offset)
                if content.end < offset and content.end > skipped_to:
                    return None
        except BrokenArchive as error:
            raise OSError(None, str(error)) from None
        content.drop_before(offset)
        return content.buffer[:bytes_max]


def _frontier(content: Content, offset: int) -> bytes:
    at = offset - content.start
    return hashlib.sha256(content.buffer[max(0, at - FRONTIER_BYTES_MAX) : at]).digest()
