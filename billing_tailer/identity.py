"""Which file on disk is which generation we know: matching, one to one, from one scan. Pure.

Holds CANNOT_SEE_IS_NOT_GONE and FAIL_CLOSED for its part: absence never ends a generation, and an impossible position
blocks its file. Tests: tests/test_identity.py, and the scenarios of tests/test_tailer.py on real files.

A generation is found again only where locator (device, inode), head and frontier agree as they should. The order:

1. a file that keeps its locator and agrees keeps its `file_id`;
2. a generation without its file may be matched to a file without a generation whose head and frontier agree (it was
   copied, restored or moved to another device); several such files block it as `ambiguous`;
3. a file that agrees with a generation still held by its own inode is a copy, and is not read; nor is one that agrees
   with a generation that is blocked, cannot be read, or may be where the scan could not look;
4. every other file is new. What stood at its locator before is ended, with its unread rest declared as a gap, but only
   after a complete scan found no file with the old content.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from billing_tailer.model import BlockReason, FileState, Gap, GapReason, Position, SeenFile, Verdict

Judge = Callable[[Position, SeenFile], Verdict]
"""Compares a file's bytes with a position; the only part of matching that looks at files."""


@dataclass(slots=True)
class Matching:
    """What one scan says of every generation and every file. Each file is in exactly one of kept, matched, copies,
    new, unread; each generation in at most one of kept, matched, ended, blocked, missing."""

    kept: dict[int, SeenFile] = field(default_factory=dict)
    """Same locator, same content (the path may be another: rotated)."""
    matched: dict[int, SeenFile] = field(default_factory=dict)
    """The content of this generation stands in another file now."""
    copies: list[SeenFile] = field(default_factory=list)
    """Not read while the original is there."""
    unread: list[SeenFile] = field(default_factory=list)
    """Not read because the generation they belong to is blocked, because they cannot be opened, or because a scan that
    did not see everything cannot tell whether they are new."""
    new: list[SeenFile] = field(default_factory=list)
    ended: dict[int, Gap | None] = field(default_factory=dict)
    blocked: dict[int, BlockReason] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)


def match(known: Sequence[Position], seen: Iterable[SeenFile], judge: Judge, *, complete: bool) -> Matching:
    """Match all generations of a source with the files of one scan.

    complete: the scan saw every directory it should have; otherwise nothing is ended, matched by content, or new
    where it could be the content of a generation that is out of sight.
    """
    result = Matching()
    files = {file.locator: file for file in seen}
    displaced: dict[int, GapReason] = {}
    loose: list[Position] = []
    for position in sorted(known, key=lambda p: -p.file_id):
        # what ended before anything was committed has no content to be known by, and would agree with any file
        ended_empty = position.state is FileState.FINAL and position.committed_offset == 0
        file = None if ended_empty else files.pop(position.locator, None)
        if file is None:
            loose.append(position)
            continue
        reason = _judge_holder(position, file, judge, result)
        if reason is not None:
            displaced[position.file_id] = reason
            loose.append(position)
            files[position.locator] = file
    _match_by_content(loose, files, judge, result, complete=complete)
    _sort_out_copies(known, files, judge, result)
    _settle_the_rest(loose, displaced, files, judge, result, complete=complete)
    return result


def _judge_holder(position: Position, file: SeenFile, judge: Judge, result: Matching) -> GapReason | None:
    """Step 1 for one generation whose locator is in sight; returns why its content is no longer there."""
    superseded = position.state is FileState.FINAL and position.blocked_reason is None
    verdict = judge(position, file)
    if verdict is Verdict.AGREES:
        result.kept[position.file_id] = file
    elif verdict is Verdict.UNREADABLE:
        result.unread.append(file)
    elif verdict is Verdict.PAST_END and not superseded:
        result.blocked[position.file_id] = BlockReason.OFFSET_PAST_END
        result.unread.append(file)
    elif verdict is Verdict.SHRUNK:
        return GapReason.TRUNCATED
    else:
        return GapReason.REGROWN if file.path == position.path else GapReason.INODE_REUSED
    return None


def _match_by_content(
    loose: Sequence[Position], files: dict[tuple[int, int], SeenFile], judge: Judge, result: Matching, *, complete: bool
) -> None:
    """Step 2. Only after a complete scan: the original may be in the directory that could not be seen."""
    if not complete:
        return
    for position in sorted(loose, key=lambda p: (-p.committed_offset, p.file_id)):
        if position.committed_offset == 0:
            continue
        candidates = [file for file in files.values() if file.named and judge(position, file) is Verdict.AGREES]
        if len(candidates) == 1:
            result.matched[position.file_id] = candidates[0]
        elif candidates:
            result.blocked[position.file_id] = BlockReason.AMBIGUOUS
            result.copies.extend(candidates)
        for file in candidates:
            del files[file.locator]


def _sort_out_copies(
    known: Sequence[Position], files: dict[tuple[int, int], SeenFile], judge: Judge, result: Matching
) -> None:
    """Step 3. Where the generation is blocked, unreadable or out of sight, its content elsewhere is not read either."""
    content = [position for position in known if position.committed_offset > 0]
    for locator, file in list(files.items()):
        agreeing = [position.file_id for position in content if judge(position, file) is Verdict.AGREES]
        if agreeing:
            held = any(file_id in result.kept or file_id in result.matched for file_id in agreeing)
            (result.copies if held else result.unread).append(files.pop(locator))


def _settle_the_rest(
    loose: Sequence[Position],
    displaced: dict[int, GapReason],
    files: dict[tuple[int, int], SeenFile],
    judge: Judge,
    result: Matching,
    *,
    complete: bool,
) -> None:
    """Step 4: what is neither kept, matched nor blocked is missing or ended; what no generation claims is new."""
    held = [*result.kept.values(), *result.matched.values(), *result.copies, *result.unread]
    for position in loose:
        if position.file_id in result.matched or position.file_id in result.blocked:
            continue
        if position.file_id not in displaced:
            result.missing.append(position.file_id)
        elif complete and position.state is not FileState.FINAL:
            elsewhere = position.committed_offset > 0 and any(judge(position, file) is Verdict.AGREES for file in held)
            result.ended[position.file_id] = None if elsewhere else lost(position, displaced[position.file_id])
    # what stands where a generation stood is not new before that one has ended
    held_back = set() if complete else {p.locator for p in loose if p.file_id in displaced}
    for locator, file in files.items():
        (result.unread if locator in held_back else result.new).append(file)


def lost(position: Position, reason: GapReason) -> Gap:
    """The gap that declares a generation's unread rest. What was appended after our last look is unknown."""
    end = position.size_seen if position.size_seen > position.committed_offset else None
    return Gap(position.file_id, position.committed_offset, end, reason)
