"""The map of hazards: what can go wrong outside the program, and the tests that make it happen.

A test is named by its file and its name, with a case of it in brackets where the hazard is one of
several. ``test_hazards_map.py`` holds the map against the tests.
"""

from __future__ import annotations

from typing import NamedTuple

GROUPS = {
    "A": "header",
    "B": "index",
    "C": "pair",
    "D": "pickle",
    "E": "adapter",
    "F": "numbers",
    "G": "paths",
    "H": "process",
    "I": "concurrency",
    "J": "command line",
    "K": "remote",
    "L": "recipe",
}


class Hazard(NamedTuple):
    """One row.

    Attributes:
        group: A letter of ``GROUPS``.
        number: Within the group, from 1.
        text: What goes wrong.
        cases: The tests that make it happen, with cases in brackets.
    """

    group: str
    number: int
    text: str
    cases: tuple[str, ...]

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests without their cases."""
        return tuple(dict.fromkeys(case.partition("[")[0] for case in self.cases))


def _rows(group: str, rows: dict[str, list[str]]) -> list[Hazard]:
    return [
        Hazard(group, number, text, tuple(cases))
        for number, (text, cases) in enumerate(rows.items(), 1)
    ]


def _of(file: str, test: str, *cases: str) -> list[str]:
    return [f"test_{file}.py::{test}[{case}]" for case in cases] or [f"test_{file}.py::{test}"]


def _header(*cases: str) -> list[str]:
    tests = ("test_as_the_original", "test_as_the_unlearned")
    return [each for test in tests for each in _of("hazards_header", test, *cases)]


def _index(*cases: str) -> list[str]:
    tests = ("test_as_the_original", "test_as_the_unlearned")
    return [each for test in tests for each in _of("hazards_index", test, *cases)]


def _pair(*tests: str) -> list[str]:
    return [each for test in tests for each in _of("hazards_pair", test)]


HEADER = {
    "a file of no bytes": _header("empty file", "four bytes"),
    "a git-lfs pointer in place of the file": _header("git-lfs pointer text"),
    "a web page or an error message in place of the file": _header(
        "HTML body", "XML body", "Entry not found body"
    ),
    "another format": _header("GGUF magic", "zip magic", "pickle magic"),
    "a byte too few or too many": [
        *_header("one byte short", "one byte long", "data cut off", "header cut off"),
        "test_hazards_header.py::test_in_one_of_several_shards",
        "test_hazards_header.py::test_the_other_commands_refuse_as_well",
    ],
    "a header length that is not one": _header("N = 2⁶³", "N = 10⁸ in a tiny file", "N = 0"),
    "a header that is no JSON object": _header(
        "header []", "header {", "header with a BOM", "header padded before", "NUL padding"
    ),
    "a name or a field that is there twice": _header(
        "duplicate name, equal offsets",
        "duplicate name, differing offsets",
        "duplicate field",
        "duplicate name by an escape",
    ),
    "offsets with holes, overlaps, or out of order": _header(
        "hole", "overlap", "same bytes twice", "first offset ≠ 0", "reversed"
    ),
    "bytes that do not fit shape and type": _header("shape × dtype ≠ bytes", "dtype ≠ bytes"),
    "dimensions that are no natural numbers, and products that overflow": _header(
        "dimension −1",
        "dimension 1.0",
        "dimension true",
        "dimension 2⁶⁴",
        "overflow [2,2⁶³−1]",
        "overflow to 0 in 64 bits",
        "overflow [0,2⁶³,2⁶³]",
    ),
    "an unknown type": _header("dtype F128"),
    "JSON nested deeply": _header("200-deep JSON", "200 000-deep JSON"),
    "a tensor name that could drive a terminal": [
        *_header("tensor name with ESC", "tensor name with NUL", "tensor name with a newline"),
        "test_cli_output.py::test_tensor_names_cannot_drive_the_terminal",
    ],
    "a header that takes gigabytes to parse": ["test_hazards_header.py::test_memory_stays_bounded"],
    "no tensors": _header("no tensors at all", "only metadata"),
}

INDEX = {
    "shard names that lead out of the directory": _index(
        "../../x as shard", "/etc/passwd as shard", "C:\\x as shard", "a/b as shard"
    ),
    "shards that are links out of it, other than the hub cache's own": [
        *_index("shard symlinked outside the directory"),
        "test_hazards_index.py::TestAccepted::test_the_links_of_the_hub_cache_are_followed",
    ],
    "shards that are no regular files": _index(
        "shard is a FIFO", "shard is a directory", "shard is a link to /dev/zero"
    ),
    "index and shards that name different tensors or files": [
        *_index(
            "shard missing",
            "all shards missing",
            "index names tensors its shard lacks",
            "shard holds tensors the index lacks",
        ),
        "test_hazards_index.py::test_many_contradictions_are_named_at_once_and_the_rest_counted",
    ],
    "a tensor in two shards": _index("tensor in two shards"),
    "a total size that is off, and metadata that is missing": [
        "test_hazards_index.py::TestAccepted::test_total_size_off_by_one_warns",
        "test_hazards_index.py::TestAccepted::test_no_metadata",
        "test_hazards_index.py::TestAccepted::test_no_metadata_key_at_all",
    ],
    "a weight map that is none": _index(
        "weight_map a list",
        "weight_map null",
        "weight_map of numbers",
        "weight_map of null",
        "duplicate keys",
    ),
    "files of two models in one directory": _index(
        "both model.safetensors and an index",
        "shards without an index",
        "mixed -of-00002 and -of-00003",
    ),
}

PAIR = {
    "embeddings with different numbers of rows": _pair(
        "test_embedding_32000_against_32002_rows", "test_shapes_of_equal_size_are_still_different"
    ),
    "a transposed matrix": _pair("test_transposed_shape_is_called_so"),
    "a head in one only": [
        *_pair(
            "test_lm_head_in_one_only_and_not_tied_in_both",
            "test_tied_lm_head_in_unlearned_only_moves_from_the_embedding",
            "test_tied_lm_head_in_original_only_is_left_out",
            "test_tied_lm_head_of_another_shape_than_the_embedding",
        ),
        "test_steering_runs.py::test_a_parameter_that_is_stored_twice_stays_one",
    ],
    "different types": _pair(
        "test_float32_and_bfloat16_mixed_are_upcast_and_reported",
        "test_dtypes_without_a_common_arithmetic",
    ),
    "integers that differ": _pair(
        "test_integer_and_bool_tensors_that_differ_are_kept_from_unlearned",
        "test_integer_tensors_of_another_width_are_kept_with_a_warning",
    ),
    "a tensor in one only": _pair(
        "test_tensor_in_one_only", "test_all_mismatches_are_listed_at_once"
    ),
    "different architectures": _pair(
        "test_different_architecture", "test_rope_is_compared_wherever_the_config_keeps_it"
    ),
    "quantised weights": [
        *_of("hazards_formats", "test_quantised_by_its_config"),
        *_of("hazards_formats", "test_quantised_by_its_tensor_names"),
        *_of("hazards_formats", "test_quantised_by_a_packed_dtype"),
        *_of("hazards_fp8", "test_the_refusal_names_the_flag"),
    ],
    "shards of a training framework": _of("hazards_formats", "test_torch_dcp_shards"),
    "experts fused in one and single in the other": [
        *_pair("test_fused_against_per_expert_moe_names"),
        *_of("experts", "test_a_model_that_the_table_does_not_know_is_refused_naming_both"),
    ],
    "the same model twice": _pair("test_identical_inputs_are_merged_with_a_warning"),
}

PICKLE = {
    "pickled weights that nobody allowed": [
        *_of("hazards_pickle", "test_hazard_bin_by_default_is_refused_naming_the_flag"),
        *_of("hazards_formats", "test_directory_without_a_model", ".bin by default"),
    ],
    "a pickle that runs code": _of("hazards_pickle", "test_hazard_os_system_reduce_does_not_run"),
    "a pickle that asks for gigabytes": [
        *_of("hazards_pickle", "test_hazard_odd_pickles_are_refused_in_bounded_memory"),
        *_of("hazards_pickle", "test_hazard_pickles_end_within_512_mib"),
    ],
    "a tensor outside its storage": _of(
        "hazards_pickle", "test_hazard_stride_or_offset_past_storage"
    ),
    "an archive that is a bomb, climbs out, or holds an entry twice; the older format": [
        *_of("hazards_pickle", "test_hazard_compressed_entry_is_refused_before_it_is_inflated"),
        *_of("hazards_pickle", "test_hazard_entry_that_climbs_out_and_entry_twice"),
        *_of("hazards_pickle", "test_hazard_legacy_non_zip_and_truncated"),
    ],
    "a PyTorch whose unpickler has holes": _of(
        "hazards_pickle", "test_hazard_no_unpickler_of_torch_is_called_and_old_ones_are_refused"
    ),
}

_CONFIG = "test_hazard_adapter_config_is_honoured_or_refused"
ADAPTER = {
    "a rank that differs from the factors": _of(
        "adapter", _CONFIG, "r differs from the rows of lora_A"
    ),
    "options that change what an adapter means": [
        *_of("adapter", "test_round_trip_with_peft"),
        *_of("adapter", _CONFIG, "DoRA without its m", "PiSSA base", "unknown non-default field"),
        *_of("adapter_dora", "test_merged_weight_is_pefts"),
        *_of("adapter_dora", "test_hazard_magnitude_vector"),
        *_of("adapter_parameters", "test_stacks_and_matrices"),
        *_of("adapter_parameters", "test_hazard_a_config_that_does_not_fit"),
    ],
    "an adapter of another kind": _of("adapter", _CONFIG, "peft_type is not LORA"),
    "half of the factors, or factors of what the base has not": [
        *_of("adapter", "test_hazard_a_without_b"),
        *_of("adapter", "test_hazard_target_absent_in_the_base_lists_all"),
        *_of("adapter_parameters", "test_hazard_factors_that_do_not_fit"),
    ],
    "modules stored whole": [
        *_of("adapter", "test_round_trip_with_peft", "embedding and modules_to_save"),
        *_of("adapter", "test_alpha_minus_1_is_the_original_with_its_adapter"),
        *_of("adapter_output", "test_alpha_minus_1_gives_saved_modules_the_bytes_of_the_original"),
    ],
    "another base than it was trained on": _of(
        "adapter", "test_hazard_another_base_is_named_and_an_adapter_alone_is_no_original"
    ),
    "numbers that scale to nothing": _of("adapter", _CONFIG, "r = 0", "lora_alpha NaN"),
}

NUMBERS = {
    "values in an input that are not finite": [
        *_of(
            "hazards_numbers",
            "test_an_input_that_is_not_finite_is_refused_with_count_and_first_index",
        ),
        *_of("steering_refusals", "test_hazard_values_that_are_not_finite_are_named_and_counted"),
    ],
    "an output that overflows": [
        *_of("hazards_numbers", "test_fp16_40000_plus_1_times_40000"),
        *_of("hazards_numbers", "test_overflow_counts_the_whole_tensor_not_a_block"),
    ],
    "an output that overflows 8 bits": _of("hazards_numbers", "test_f8_past_448"),
    "an α that is no usable number": [
        *_of("hazards_cli", "test_alpha_that_is_no_coefficient"),
        *_of("hazards_numbers", "test_alpha_that_is_no_usable_number"),
    ],
    "a step that rounding takes away": _of(
        "hazards_numbers", "test_update_rounded_away_is_warned_of_with_the_share"
    ),
    "copies that are not exact": [
        *_of("hazards_numbers", "test_alpha_0_and_minus_1_are_byte_identical"),
        *_of("merge_bytes", "test_what_has_no_update_keeps_its_bytes_at_any_alpha"),
        *_of("arithmetic", "test_without_an_update_zeros_and_subnormals_keep_their_bytes"),
    ],
    "bytes that depend on threads or blocks": [
        *_of("hazards_numbers", "test_1_or_n_threads_write_identical_bytes"),
        *_of("merge_bytes", "test_shards_and_sums_are_the_same_for_any_block_size"),
        *_of("rounding", "test_threads_interruptions_and_the_other_tensors_change_no_byte"),
    ],
}

PATHS = {
    "an output that is, holds, or lies in an input": [
        *_of("hazards_paths", "test_output_equals_lies_in_contains_or_links_to_an_input"),
        *_of("hazards_paths", "test_output_is_or_lies_in_a_bind_mount_of_an_input"),
        *_of("steering_refusals", "test_hazard_the_output_is_a_related_checkpoint"),
    ],
    "an output where something is": [
        *_of("hazards_paths", "test_output_exists_and_is_not_empty"),
        *_of("hazards_paths", "test_output_is_a_file"),
    ],
    "what may not be read or written": [
        *_of("hazards_paths", "test_read_only_directory"),
        *_of("hazards_paths", "test_input_mode_0000"),
        *_of("storage_local", "TestSystemErrors::test_permission_denied_is_not_called_missing"),
    ],
    "an output on another file system": _of("hazards_paths", "test_output_on_another_file_system"),
    "odd names": [
        *_of("hazards_names", "test_name_that_no_file_system_takes"),
        *_of("hazards_names", "test_inputs_and_sidecars_with_names_that_are_not_utf8"),
        *_of("hazards_names", "test_leading_dash"),
        *_of("hazards_names", "test_trailing_slash"),
    ],
    "a sidecar that is a link to a secret": [
        *_of("hazards_names", "test_sidecar_that_is_a_symlink_to_etc_shadow"),
        *_of("hazards_names", "test_sidecar_that_links_out_of_its_checkpoint"),
    ],
    "the umask": _of("hazards_names", "test_umask_decides_the_modes"),
}

PROCESS = {
    "a disk that is full": [
        *_of("limits", "test_hazard_no_bytes_left_preflight_says_needed_and_free"),
        *_of("limits", "test_hazard_no_inodes_left_preflight_says_needed_and_free"),
        *_of("limits", "test_hazard_enospc_mid_run_can_be_continued"),
        *_of("faults", "test_any_call_may_fail_and_the_rerun_makes_the_same_bytes"),
        *_of(
            "sweep",
            "test_error_of_every_system_call_is_one_line_and_can_be_continued",
            "write-ENOSPC",
            "pwrite64-ENOSPC",
        ),
    ],
    "errors of the system, short writes, interrupted calls": [
        *_of("sweep", "test_error_of_every_system_call_is_one_line_and_can_be_continued"),
        *_of("faults", "test_a_short_write_at_every_call_is_gone_on_with"),
        *_of("durable", "test_a_shard_of_another_size_than_planned_is_never_given_its_name"),
        *_of("faults", "test_a_failing_call_under_several_threads_ends_all_of_them"),
        *_of(
            "filesystem",
            "TestLocalFileSystem::test_a_write_that_the_system_cuts_short_is_gone_on_with",
        ),
        *_of("storage_local", "TestSystemErrors::test_a_read_error_is_named"),
        *_of("steering_runs", "test_the_disk_fails_at_any_call_for_what_is_measured"),
    ],
    "limits of file size and of open files": [
        *_of("limits", "test_hazard_rlimit_fsize_is_refused_before_anything_is_written"),
        *_of("limits", "test_hazard_rlimit_nofile_16_with_60_shards_a_side"),
        *_of("limits", "test_hazard_rlimit_nofile_16_with_500_shards_a_side"),
        *_of("grid", "TestWhatAReaderFound::test_more_models_than_files_may_be_open"),
    ],
    "a kill at any moment": [
        *_of("sweep", "test_sigkill_at_every_system_call_then_run_again_same_bytes"),
        *_of("resume", "test_hazard_sigkill_at_random_moments_then_run_again_same_bytes"),
        *_of("resume", "test_hazard_sigkill_again_and_again_with_arithmetic_same_bytes"),
        *_of("resume", "test_three_hundred_kills"),
        *_of("steering_runs", "test_hazard_sigkill_then_run_again_same_bytes"),
        *_of("bucket", "TestKills::test_hazard_killed_and_run_again"),
        *_of("grid", "test_a_grid_goes_on_where_it_was_stopped"),
        *_of(
            "grid", "TestWhatAReaderFound::test_what_was_published_and_not_cleaned_up_is_cleaned_up"
        ),
        *_of(
            "grid",
            "TestWhatAReaderFound::test_what_a_kill_leaves_of_a_variant_that_is_done_is_no"
            "_obstacle",
        ),
    ],
    "signals, and a reader that goes away": [
        *_of("signals", "test_hazard_signal_ends_a_run_that_can_be_continued"),
        *_of("signals", "test_hazard_the_second_signal_ends_at_once"),
        *_of("signals", "test_hazard_signal_while_the_arithmetic_is_loaded"),
        *_of("cli_output", "test_closed_pipe_gives_no_traceback"),
        *_of("cli_output", "test_closed_pipe_after_the_merge_leaves_the_model"),
        *_of("cli_output", "test_streams_closed_from_the_start"),
    ],
    "a power cut": [
        *_of("crash_states", "test_hazard_every_state_of_a_power_cut_keeps_the_promise"),
        *_of("crash_states", "test_a_power_cut_in_the_run_that_goes_on_after_one"),
        *_of("crash_states", "test_every_state_of_a_power_cut_is_gone_on_from"),
        *_of("crash_states", "test_power_cut_after_power_cut"),
        *_of("power_cut", "test_hazard_power_cut_at_each_boundary"),
        *_of("power_cut", "test_a_finished_run_outlives_a_power_cut"),
        *_of("power_cut_disk", "test_hazard_power_cut_on_a_real_file_system"),
        *_of("durable", "test_nothing_is_promised_before_it_is_on_the_disk"),
        *_of(
            "durable",
            "test_overwriting_exchanges_and_removes_the_old_model_after_the_new_name_is_durable",
        ),
        *_of(
            "filesystem", "TestLocalFileSystem::test_exchange_by_renames_syncs_each_before_the_next"
        ),
        *_of("filesystem", "TestLocalFileSystem::test_what_is_to_be_durable_is_synced"),
        *_of("mutations", "test_a_planted_fault_is_caught"),
    ],
    "little memory": [
        *_of("limits", "test_hazard_memory_is_capped"),
        *_of("limits", "test_hazard_memory_that_does_not_suffice_is_one_line"),
        *_of("hazards_header", "test_memory_stays_bounded"),
        *_of("hazards_index", "test_memory_stays_bounded"),
    ],
    "inputs that change meanwhile": [
        *_of("signals", "test_hazard_input_changed_mid_run"),
        *_of("signals", "test_hazard_input_removed_mid_run"),
        *_of("signals", "test_hazard_input_truncated_while_it_is_read_is_no_sigbus"),
        *_of("signals", "test_hazard_input_changed_between_runs_is_refused_naming_it"),
    ],
    "a damaged journal": [
        *_of("journal", "test_hazard_torn_or_flipped_journal_ends_in_the_same_bytes"),
        *_of("journal", "test_torn_at_every_byte_it_says_what_its_whole_lines_say"),
        *_of("journal", "test_a_recorded_shard_that_is_not_what_was_recorded_is_written_again"),
        *_of("steering_runs", "test_what_was_measured_and_is_damaged_is_measured_again"),
    ],
    "going on with other arguments": [
        *_of("journal", "test_hazard_resume_with_another"),
        *_of("journal", "test_hazard_resume_with_another_version"),
        *_of("steering_runs", "test_another_command_is_refused_naming_what_differs"),
        *_of(
            "grid",
            "TestWhatAReaderFound::test_another_checkpoint_with_the_same_stamps_is_measured_anew",
        ),
    ],
}

CONCURRENCY = {
    "two runs on one output": [
        *_of("concurrency", "test_hazard_two_runs_on_one_output"),
        *_of("lock", "test_a_second_run_is_refused_and_told_who_holds_it"),
    ],
    "a lock of a dead run, and locks that do nothing": [
        *_of("concurrency", "test_hazard_stale_lock_of_a_killed_run_is_no_obstacle"),
        *_of("lock", "test_hazard_stale_lock"),
        *_of("lock", "test_hazard_without_flock_the_identity_still_keeps_the_second_out"),
        *_of("lock", "test_a_short_write_leaves_no_torn_lock"),
        *_of("lock", "test_of_many_that_want_a_stale_lock_one_at_a_time_gets_it"),
    ],
    "somebody who reads meanwhile": [
        *_of("concurrency", "test_hazard_reader_polling_during_publish_sees_nothing_or_all"),
        *_of(
            "concurrency",
            "test_hazard_reader_polling_while_a_model_is_replaced_sees_the_old_or_the_new",
        ),
    ],
    "somebody who makes the output meanwhile": _of(
        "concurrency", "test_hazard_output_created_meanwhile_work_kept"
    ),
}

COMMAND_LINE = {
    "arguments that are missing, unknown, swapped, or no numbers": [
        *_of("hazards_cli", "test_arguments_missing_or_unknown"),
        *_of("hazards_cli", "test_swapped_originals"),
        *_of("hazards_cli", "test_max_shard_size_that_is_none"),
        *_of("hazards_cli", "test_tensor_larger_than_a_shard"),
    ],
    "a dry run that writes": [
        *_of("hazards_cli", "test_dry_run_prints_the_plan_and_writes_nothing"),
        *_of("hazards_cli", "test_dry_run_refuses_what_the_run_would_refuse"),
    ],
}

REMOTE = {
    "refusals of a server, no network, a token": [
        *_of("hub_failures", "TestRefusals::test_a_listing_refused"),
        *_of("hub_failures", "TestRefusals::test_unknown_repository_and_revision"),
        *_of("hub_failures", "TestRefusals::test_failures_that_stay"),
        *_of("hub_failures", "TestRefusals::test_failures_that_pass"),
        *_of("hub_failures", "TestRefusals::test_a_name_that_does_not_resolve"),
        *_of("hub_failures", "TestCache::test_offline_without_a_cache"),
        *_of("hub_failures", "TestTransfer::test_the_token_stays_with_the_hub"),
        *_of("bucket", "TestTheWayThere::test_hazard_access_denied"),
    ],
    "bytes that are cut off, too many, or others": [
        *_of("hub_failures", "TestTransfer::test_a_download_cut_half_way_goes_on"),
        *_of("hub_failures", "TestTransfer::test_another_size_of_the_download"),
        *_of("hub_failures", "TestTransfer::test_the_right_size_and_wrong_bytes"),
        *_of("bucket", "TestTheWayThere::test_hazard_bodies_cut_half_way"),
        *_of("bucket", "TestChanges::test_hazard_other_bytes_are_stored_than_were_sent"),
    ],
    "a server that ignores ranges": [
        *_of("hub", "TestBeforeTheDownload::test_a_hub_that_ignores_ranges_is_cut_off"),
        *_of("hub_failures", "TestTransfer::test_another_range"),
        *_of("urls", "test_a_store_that_ignores_ranges_is_refused"),
    ],
    "a branch that moves": [
        *_of("hub", "TestPinning::test_a_branch_that_moves_after_the_listing"),
        *_of("bucket", "TestChanges::test_hazard_replaced_between_planning_and_reading"),
    ],
    "code that a checkpoint brings": [
        *_of("hub", "TestMerge::test_custom_code_is_carried_and_not_run"),
        *_of("sidecars", "test_code_is_copied_and_never_imported"),
    ],
}

_YAML, _OTHERS = "test_a_yaml_that_is_no_recipe", "test_a_json_or_toml_that_is_no_recipe"
RECIPE = {
    "aliases that grow": [
        *_of("recipe_file", _YAML, "a: &x 1\nalpha: *x", "alpha: &x [*x]"),
        *_of("card", "test_a_card_whose_aliases_grow_exponentially"),
    ],
    "a recipe that makes objects": _of(
        "recipe_file", _YAML, "alpha: !!python/object/apply:os.system ['touch canary']"
    ),
    "scalars that YAML reads otherwise, keys that are unknown or there twice": [
        *_of(
            "recipe_file",
            _YAML,
            "alpha: .inf",
            "alpha: .nan",
            "alpha: 1:30",
            "alpha: 1\nalpha: 2",
            "alpha: 1\nalfa: 2",
        ),
        *_of("recipe_file", _OTHERS),
    ],
    "a rule that matches nothing": _of(
        "coefficients", "test_what_matches_nothing_or_makes_no_sense_is_refused"
    ),
    "nesting and numbers without end": [
        *_of("recipe_file", _YAML),
        *_of("recipe_file", "test_no_bytes_are_worse_than_an_error"),
    ],
}

_TABLES = [
    *(HEADER, INDEX, PAIR, PICKLE, ADAPTER, NUMBERS),
    *(PATHS, PROCESS, CONCURRENCY, COMMAND_LINE, REMOTE, RECIPE),
]
HAZARDS = [row for group, table in zip(GROUPS, _TABLES, strict=True) for row in _rows(group, table)]
