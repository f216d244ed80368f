"""Which file on disk is which generation we know: matching, one to one, from one scan. Pure.

Holds CANNOT_SEE_IS_NOT_GONE and FAIL_CLOSED for its part: absence never ends a generation, and an impossible position
blocks its file. Tests: tests/test_identity.py, and the scenarios of tests/test_tailer.py on real files.

A generation is found again only where locator (device, inode), head and frontier agree as they should. The order:

1. a file that keeps its locator and agrees keeps its `file_id`;
2. a generation without its file may be matched to a file without a generation whose head and frontier agree (it was
   copied, restored or moved to another device); several such files block it as `ambiguous`, unless it is final: nothing
   waits for a decision then, and they are new;
3. a file that agrees with a generation still held by its own inode is a copy, and is not read; nor is one that agrees
   with a generation that is blocked, cannot be read, or may be where the scan could not look. A copy that has other
   bytes than its original, or more, goes its own way: it is read from 0, and the calls that both tell of are replays.
   Where the original is gone from the directories and silent, the one file that goes on from it has replaced it and
   takes its `file_id`, as does the gzip file that it has become;
4. every other file is new. What stood at its locator before is ended, with its unread rest declared as a gap, but only
   after a complete scan found no file with the old content.

Files are looked up by their first bytes, so that only alike ones are compared.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from billing_tailer.model import BlockReason, FileState, Gap, GapReason, Position, SeenFile, Verdict


class Look(Protocol):
    """The only part of matching that looks at files (`files.LogFiles`)."""

    def judge(self, position: Position, file: SeenFile) -> Verdict:
        """Compare a file's bytes with a position."""

    def head(self, file: SeenFile) -> bytes:
        """The first bytes of a file, as many as a position's head may have; empty where it cannot be read."""

    def same_rest(self, position: Position, one: SeenFile, other: SeenFile) -> bool | None:
        """Whether two files that agree with a position go on alike, to the end of the first; None where they do as far
        as could be looked."""

    def is_prefix(self, one: SeenFile, other: SeenFile) -> bool:
        """Whether the end of a file stands at the same place in another, longer one."""


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
    missing: set[int] = field(default_factory=set)
    replaced: dict[int, SeenFile] = field(default_factory=dict)
    """Gone from the directories; another file, in `matched`, has taken over their generation."""
    longer: list[SeenFile] = field(default_factory=list)
    """Copies with more than their original, which is gone from the directories but not silent yet."""
    redundant: list[SeenFile] = field(default_factory=list)
    """Of the copies, those that no directory shows any more and that have nothing of their own."""


Agreeing = Mapping[tuple[int, int], Mapping[int, Verdict]]
"""For each file that no generation holds: the generations whose content it has."""


class _ByHead:
    """Generations that have content, looked up by the first bytes of a file."""

    def __init__(self, known: Iterable[Position]) -> None:
        self._by_length: dict[int, dict[bytes, list[Position]]] = {}
        for position in known:
            if position.committed_offset:
                self._by_length.setdefault(len(position.head), {}).setdefault(position.head, []).append(position)

    def alike(self, head: bytes) -> list[Position]:
        return [
            position
            for length, heads in self._by_length.items()
            if length <= len(head)
            for position in heads.get(head[:length], ())
        ]


def match(
    known: Sequence[Position],
    seen: Iterable[SeenFile],
    look: Look,
    *,
    complete: bool,
    silent: Container[tuple[int, int]] = (),
    tick: Callable[[], None] = lambda: None,
) -> Matching:
    """Match all generations of a source with the files of one scan.

    complete: the scan saw every directory it should have; otherwise nothing is ended, matched by content, or new
    where it could be the content of a generation that is out of sight. silent: locators of files that are gone from the
    directories and have not changed for a while. tick: called between two looks at files, which may be many.
    """
    result = Matching()
    files = {file.locator: file for file in seen}
    displaced: dict[int, GapReason] = {}
    loose: list[Position] = []
    for position in sorted(known, key=lambda p: -p.file_id):
        file = None if _has_ended_here(position) else files.pop(position.locator, None)
        if file is None:
            loose.append(position)
            continue
        tick()
        reason = _judge_holder(position, file, look, result)
        if reason is not None:
            displaced[position.file_id] = reason
            loose.append(position)
            files[position.locator] = file
    if files or displaced:
        agreeing = _agreeing(known, files, displaced, look, result, tick)
        if complete:
            _match_by_content(loose, files, agreeing, result)
            _hand_over(known, files, agreeing, look, silent, result)
        _sort_out_copies(known, loose, files, agreeing, look, result, complete=complete)
    _settle_the_rest(loose, displaced, files, look, result, complete=complete)
    return result


def _has_ended_here(position: Position) -> bool:
    """Whether a generation cannot come back at its own place: it has no content to be known by, or bytes of it were
    lost there, and what stands there now is another generation's."""
    lost_some = position.committed_offset == 0 or position.size_seen > position.committed_offset
    return position.state is FileState.FINAL and lost_some


def _judge_holder(position: Position, file: SeenFile, look: Look, result: Matching) -> GapReason | None:
    """Step 1 for one generation whose locator is in sight; returns why its content is no longer there."""
    superseded = position.state is FileState.FINAL and position.blocked_reason is None
    verdict = look.judge(position, file)
    if verdict is Verdict.AGREES:
        result.kept[position.file_id] = file
    elif verdict is Verdict.UNREADABLE:
        result.unread.append(file)
    elif verdict is Verdict.PAST_END and not superseded:
        result.blocked[position.file_id] = BlockReason.OFFSET_PAST_END
        result.unread.append(file)
    elif verdict in (Verdict.SHRUNK, Verdict.CUT):
        return GapReason.TRUNCATED
    else:
        return GapReason.REGROWN if file.path == position.path else GapReason.INODE_REUSED
    return None


def _agreeing(
    known: Sequence[Position],
    files: dict[tuple[int, int], SeenFile],
    displaced: Container[int],
    look: Look,
    result: Matching,
    tick: Callable[[], None],
) -> Agreeing:
    """Compare every file that no generation holds with the generations that begin like it. One that cannot be compared
    is set aside as unread: it may be any of them."""
    by_head = _ByHead(known)
    found: dict[tuple[int, int], dict[int, Verdict]] = {}
    for locator, file in list(files.items()):
        tick()
        verdicts: dict[int, Verdict] = {}
        for position in by_head.alike(look.head(file)):
            tick()
            if position.locator == locator and (position.file_id in displaced or _has_ended_here(position)):
                continue  # it was judged as the holder, and is not
            verdict = look.judge(position, file)
            original = result.kept.get(position.file_id)
            # shorter than what is committed: a copy that is still being made
            unfinished = verdict is Verdict.PAST_END and original is not None and look.is_prefix(file, original)
            if unfinished or verdict in (Verdict.AGREES, Verdict.CUT, Verdict.UNREADABLE):
                verdicts[position.file_id] = verdict
        if Verdict.UNREADABLE in verdicts.values():
            result.unread.append(files.pop(locator))
            continue
        found[locator] = verdicts
    return found


def _match_by_content(
    loose: Sequence[Position], files: dict[tuple[int, int], SeenFile], agreeing: Agreeing, result: Matching
) -> None:
    """Step 2. Only after a complete scan: the original may be in the directory that could not be seen."""
    claims: dict[int, list[SeenFile]] = {}
    for locator, verdicts in agreeing.items():
        for file_id, verdict in verdicts.items():
            if verdict is Verdict.AGREES:
                claims.setdefault(file_id, []).append(files[locator])
    claimants = [position for position in loose if position.file_id in claims]
    ended = {position.file_id for position in loose if position.state is FileState.FINAL}
    for position in sorted(claimants, key=lambda p: (p.state is FileState.FINAL, -p.committed_offset, p.file_id)):
        found = [file for file in claims[position.file_id] if file.locator in files]
        if position.state is FileState.FINAL:  # it waits for nothing: a copy of what another one has stays that
            found = [file for file in found if agreeing[file.locator].keys() <= ended - result.matched.keys()]
        # what is only held open counts where no directory shows another one, what is compressed where nothing else is
        found = [file for file in found if file.listed] or found
        candidates = [file for file in found if not file.compressed] or found
        if all(file.compressed and file.size <= position.committed_offset for file in candidates):
            candidates = candidates[:1]  # there is nothing to be read in any of them
        if len(candidates) > 1 and position.state is FileState.FINAL:
            continue  # an operator gave up its rest, or it was lost: what they share are replays
        if len(candidates) == 1:
            result.matched[position.file_id] = candidates[0]
        elif candidates:
            result.blocked[position.file_id] = BlockReason.AMBIGUOUS
            result.copies.extend(candidates)
        for file in candidates:
            del files[file.locator]


def _hand_over(
    known: Sequence[Position],
    files: dict[tuple[int, int], SeenFile],
    agreeing: Agreeing,
    look: Look,
    silent: Container[tuple[int, int]],
    result: Matching,
) -> None:
    """Step 3 for an original that is gone from the directories: one longer file with its content has replaced it."""
    by_id = {position.file_id: position for position in known}
    successors: dict[int, list[SeenFile]] = {}
    for locator, verdicts in agreeing.items():
        file = files.get(locator)
        for file_id in verdicts:
            original = result.kept.get(file_id)
            if file is None or not file.listed or original is None or original.listed:
                continue
            # a gzip file is the original once that is gone; another copy has replaced it only if it goes on
            if file.size > original.size or (file.compressed and file.size == original.size):
                successors.setdefault(file_id, []).append(file)
    for file_id, found in successors.items():
        position, original = by_id[file_id], result.kept[file_id]
        if original.locator not in silent:
            result.longer.extend(file for file in found if file.size > original.size)
            continue
        alike = [file for file in found if file.locator in files and look.same_rest(position, original, file)]
        heirs = [file for file in alike if file.path == position.path] or alike
        if len(heirs) == 1:
            del result.kept[file_id], files[heirs[0].locator]
            result.matched[file_id] = heirs[0]
            result.replaced[file_id] = original


def _sort_out_copies(
    known: Sequence[Position],
    loose: Sequence[Position],
    files: dict[tuple[int, int], SeenFile],
    agreeing: Agreeing,
    look: Look,
    result: Matching,
    *,
    complete: bool,
) -> None:
    """Step 3. Where the generation is blocked, unreadable or out of sight, its content elsewhere is not read either."""
    by_id = {position.file_id: position for position in known}
    held = {**result.kept, **result.matched}
    unclaimed = {position.file_id for position in loose} - result.blocked.keys() - held.keys() if complete else set()
    waiting = {file.locator for file in result.longer}
    for locator, file in list(files.items()):
        originals = [(by_id[file_id], held[file_id]) for file_id in agreeing[locator] if file_id in held]
        same = [look.same_rest(position, file, original) for position, original in originals]
        # that of a blocked or unreadable generation may go on as this file does
        doubtful = agreeing[locator].keys() - held.keys() - unclaimed
        goes_on_otherwise = originals and not any(one is not False for one in same)
        if goes_on_otherwise and complete and not doubtful and locator not in waiting:
            continue
        # a copy that lacks bytes which were seen, of a generation that is gone: read from 0, like any other file
        if agreeing[locator].keys() <= unclaimed:
            continue
        (result.copies if originals else result.unread).append(files.pop(locator))
        if not file.listed and True in same:
            result.redundant.append(file)


def _settle_the_rest(
    loose: Sequence[Position],
    displaced: dict[int, GapReason],
    files: dict[tuple[int, int], SeenFile],
    look: Look,
    result: Matching,
    *,
    complete: bool,
) -> None:
    """Step 4: what is neither kept, matched nor blocked is missing or ended; what no generation claims is new."""
    elsewhere = _found_elsewhere([p for p in loose if p.file_id in displaced], files, look, result) if complete else {}
    for position in loose:
        if position.file_id in result.matched or position.file_id in result.blocked:
            continue
        if position.file_id not in displaced:
            result.missing.add(position.file_id)
        elif complete and position.state is not FileState.FINAL:
            result.ended[position.file_id] = lost(
                position, displaced[position.file_id], found_to=elsewhere.get(position.file_id)
            )
    # what stands where a generation stood is not new before that one has ended
    held_back = set() if complete else {p.locator for p in loose if p.file_id in displaced}
    for locator, file in files.items():
        (result.unread if locator in held_back else result.new).append(file)


def _found_elsewhere(
    displaced: Sequence[Position], new: Mapping[tuple[int, int], SeenFile], look: Look, result: Matching
) -> dict[int, int]:
    """The displaced generations whose content stands in a file of another one, or in a copy: up to which byte."""
    if not displaced:
        return {}
    by_head = _ByHead(displaced)
    found: dict[int, int] = {}
    # not in files that another generation holds: those may have gone their own way before the bytes came that were lost
    for file in (*result.matched.values(), *result.copies, *result.unread, *new.values()):
        for position in by_head.alike(look.head(file)):
            if position.locator != file.locator and look.judge(position, file) in (Verdict.AGREES, Verdict.CUT):
                found[position.file_id] = max(found.get(position.file_id, 0), file.size)
    return found


def lost(position: Position, reason: GapReason, *, found_to: int | None = None) -> Gap | None:
    """The gap that declares a generation's unread rest. What was appended after our last look is unknown.

    found_to: up to this byte its content stands in another file.
    """
    if found_to is not None:
        start = max(position.committed_offset, found_to)
        return Gap(position.file_id, start, position.size_seen, reason) if start < position.size_seen else None
    end = position.size_seen if position.size_seen > position.committed_offset else None
    return Gap(position.file_id, position.committed_offset, end, reason)


def deciding_commands(position: Position) -> tuple[str, ...]:
    """What an operator may type to decide a generation that is not read, the likelier first; none where nothing is to
    be decided."""
    accept = f"billing-tailer offsets accept-gap {position.file_id} --reason TEXT"
    adopt = f"billing-tailer offsets adopt {position.file_id} PATH --reason TEXT"
    if position.blocked_reason is BlockReason.OFFSET_PAST_END:
        return accept, adopt
    if position.state in (FileState.BLOCKED, FileState.MISSING):
        return adopt, accept
    return ()
