"""Every scenario that a tailer of money must survive, and the tests that hold it: the list of docs/scenarios.md.

A name without a file is a test of the file that was named before it. tests/scenarios/test_inventory.py sees to it that
they all exist, and that no test of this package is missing from the list.
"""

from collections.abc import Iterator
from typing import Final

HERE: Final = "tests/scenarios/"
TORTURE: Final = "tests/torture/test_torture.py::test_nothing_is_lost_doubled_or_undeclared"

SCENARIOS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "Discovery": {
        "empty directory, then a first file": (f"{HERE}test_discovery.py::test_an_empty_directory_then_a_first_file",),
        "10,000 files": (f"{HERE}test_discovery.py::test_ten_thousand_files",),
        "two files with the same first 4 KiB": (
            f"{HERE}test_discovery.py::test_two_files_with_the_same_first_4_kib",
            "tests/test_tailer.py::test_two_files_with_the_same_beginning",
        ),
        "0 bytes, then one line": (f"{HERE}test_discovery.py::test_zero_bytes_then_one_line",),
        "same inode through two globs, hardlink and symlink": (
            f"{HERE}test_discovery.py::test_the_same_inode_through_two_globs_a_hard_link_and_a_symlink",
        ),
        "FIFO, directory, device named like a log": (
            f"{HERE}test_discovery.py::test_a_fifo_a_directory_and_a_device_named_like_a_log",
        ),
        "unreadable, later readable": (f"{HERE}test_discovery.py::test_unreadable_later_readable",),
        "file names with newline and non-UTF-8 bytes": (
            f"{HERE}test_discovery.py::test_file_names_with_newline_and_non_utf8_bytes",
        ),
    },
    "Rotation": {
        "rename with the writer still on the old descriptor": ("tests/test_tailer.py::test_rotation_by_rename",),
        "several rotations while stopped, some gzipped, one line completed after the rename": (
            (
                "tests/test_archives.py::"
                "test_several_rotations_while_stopped_some_compressed_one_line_completed_after_the_rename"
            ),
        ),
        "a late write to a rotated file": (f"{HERE}test_rotation.py::test_a_late_write_to_a_rotated_file",),
        "three files rotated three times at millisecond intervals": (
            f"{HERE}test_rotation.py::test_three_files_rotated_three_times_at_millisecond_intervals",
        ),
        "rename between stat and open": (f"{HERE}test_rotation.py::test_renamed_between_stat_and_open",),
        "rotated and deleted with bytes unread and Postgres down": (
            "tests/test_follower.py::test_deleted_while_postgres_is_away",
        ),
    },
    "Truncation": {
        "a writer that does not append leaving a sparse NUL hole": (
            "tests/test_holes.py::test_a_writer_without_o_append_leaves_a_sparse_hole",
        ),
        "to 0 and appended": (
            f"{HERE}test_truncation.py::test_other_content_where_known_content_stood",
            "tests/test_tailer.py::test_truncation_to_zero",
        ),
        "regrown past the offset while running and while stopped, also with equal heads and fixed-width lines": (
            f"{HERE}test_truncation.py::test_other_content_where_known_content_stood",
            "tests/test_tailer.py::test_regrown_past_the_offset",
        ),
        "to the middle of a committed line": (
            f"{HERE}test_truncation.py::test_truncated_to_the_middle_of_a_committed_line",
            f"{HERE}test_truncation.py::test_truncated_to_the_middle_of_a_committed_line_and_regrown",
        ),
        "in-place rewrite": (
            f"{HERE}test_truncation.py::test_other_content_where_known_content_stood",
            f"{HERE}test_truncation.py::test_an_in_place_rewrite_of_the_middle",
        ),
        "during a commit in flight": (f"{HERE}test_truncation.py::test_truncated_during_a_commit_in_flight",),
        "atomic replace": (
            f"{HERE}test_truncation.py::test_other_content_where_known_content_stood",
            "tests/test_follower.py::test_atomic_replace_by_a_longer_copy_of_a_silent_file",
        ),
        "inode reuse": (
            f"{HERE}test_truncation.py::test_inode_reuse",
            "tests/test_archives.py::test_the_inode_of_a_compressed_log_is_used_again",
        ),
    },
    "Framing": {
        "half a line for an hour": (f"{HERE}test_framing.py::test_half_a_line_for_an_hour",),
        "a line dribbled byte by byte through a multi-byte character, a restart and a rotation": (
            (
                f"{HERE}test_framing.py::"
                "test_a_line_dribbled_byte_by_byte_through_a_multi_byte_character_a_restart_and_a_rotation"
            ),
        ),
        "limit-1, limit, limit+1, 1 GiB": ("tests/test_tailer.py::test_lines_around_the_limit", f"{TORTURE}[line]"),
        "empty lines, CRLF, BOM": (f"{HERE}test_framing.py::test_empty_lines_crlf_and_a_bom",),
        "newline at every buffer edge": (
            f"{HERE}test_framing.py::test_a_newline_at_every_buffer_edge",
            f"{HERE}test_framing.py::test_the_newline_of_an_over_long_line_at_every_buffer_edge",
        ),
        "2 and 4 GiB files": (f"{HERE}test_framing.py::test_two_and_four_gib_files", f"{TORTURE}[hole]"),
    },
    "Content": {
        "a poison row among 10,000 (a NUL escape, lone surrogate, number overflow, NaN)": (
            f"{HERE}test_content.py::test_a_poison_row_among_10_000",
        ),
        "a file of nothing but poison": (f"{HERE}test_content.py::test_a_file_of_nothing_but_poison",),
        "duplicate keys, 1e400, 20-digit integers": (
            f"{HERE}test_content.py::test_duplicate_keys_1e400_and_20_digit_integers",
        ),
        "the same call id at two offsets": (f"{HERE}test_content.py::test_the_same_call_id_at_two_offsets",),
    },
    "Crash and database": {
        "kill -9 at every statement and syscall of the loop, thousands of random runs": (
            f"{TORTURE}[crash]",
            "tests/test_crash.py::test_fifty_kills_with_a_second_tailer_beside",
        ),
        "connection cut after COMMIT arrived": (
            f"{TORTURE}[commit]",
            "tests/test_outage.py::test_a_connection_cut_after_commit_arrived",
        ),
        "serialization failure": (f"{HERE}test_database.py::test_serialization_failure_disk_full_and_their_like",),
        "statement timeout": (f"{HERE}test_database.py::test_statement_timeout",),
        "server restart": (
            "tests/test_outage.py::test_ten_seconds_without_postgres_under_load",
            f"{TORTURE}[postgres]",
        ),
        "disk full": (
            f"{HERE}test_database.py::test_serialization_failure_disk_full_and_their_like",
            f"{HERE}test_database.py::test_disk_full_in_the_middle_of_a_transaction",
        ),
        "database restored to an earlier state": (
            f"{HERE}test_database.py::test_database_restored_to_an_earlier_state",
        ),
        "Postgres away during 20 rotations": (f"{HERE}test_database.py::test_postgres_away_during_20_rotations",),
        "SIGTERM during a hanging COMMIT": ("tests/test_app.py::test_sigterm_while_postgres_hangs",),
        "damaged position rows": (
            f"{HERE}test_database.py::test_damaged_position_rows",
            f"{HERE}test_database.py::test_a_position_row_with_another_identity",
            "tests/test_ledger.py::test_damaged_positions_are_refused_by_the_schema",
        ),
        "two tailers on one file, the paused one wakes": ("tests/test_app.py::test_a_frozen_owner_is_replaced",),
    },
    "Environment": {
        "bytes that appear as NUL before they are data": (
            "tests/test_holes.py::test_bytes_that_appear_as_nul_before_they_are_data",
            "tests/test_holes.py::test_nothing_follows",
        ),
        "mount missing at start": ("tests/test_app.py::test_no_mount",),
        "mount missing for 5 s": (f"{HERE}test_environment.py::test_mount_missing_for_5_s",),
        "device number changed": (f"{HERE}test_environment.py::test_device_number_changed",),
        "inotify off or overflowing": (
            "tests/test_app.py::test_without_inotify_the_poll_does_the_work",
            f"{HERE}test_environment.py::test_inotify_overflowing",
        ),
        "EMFILE, EIO, ENOSPC, ESTALE": (
            f"{HERE}test_environment.py::test_emfile_eio_enospc_estale",
            f"{HERE}test_environment.py::test_emfile_by_the_limit_of_the_process",
            f"{HERE}test_environment.py::test_enospc_of_the_writer",
            "tests/test_follower.py::test_a_bad_sector",
            "tests/test_callbacks_exactly_once.py::test_a_full_disk_loses_nothing_that_was_acknowledged",
        ),
        "clock jumping": (
            f"{HERE}test_environment.py::test_clock_jumping",
            f"{HERE}test_environment.py::test_clock_behind_the_times_of_a_gzip_file",
        ),
        "one hot file and 500 slow ones": (f"{HERE}test_environment.py::test_one_hot_file_and_500_slow_ones",),
    },
    "Model test": {
        "append, half append, rename, copytruncate, delete, recreate, gzip, kill, restart, database failure": (
            f"{TORTURE}[model]",
        ),
    },
    "Proof": {
        "`verify` re-reads every surviving file and reports 0 differences": (
            "tests/test_verify.py::test_a_sound_log",
            "tests/test_verify.py::test_survivors",
        ),
        "with one byte flipped anywhere it names that range": ("tests/test_verify.py::test_one_flipped_byte_is_named",),
    },
}
"""Area -> scenario -> the tests that hold it."""


def nodes() -> Iterator[str]:
    """Every test of the list, as pytest names it; some stand for several scenarios."""
    for scenarios in SCENARIOS.values():
        for tests in scenarios.values():
            yield from tests
