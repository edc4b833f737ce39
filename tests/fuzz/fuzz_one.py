"""Coverage-guided fuzzing of one target of ``tests/fuzzing.py``, for so many seconds.

    python tests/fuzz/fuzz_one.py TARGET SECONDS [CORPUS]

What libFuzzer finds interesting is kept in CORPUS, and an input that breaks a property in
``crash-…`` there. atheris is installed by ``make fuzz`` into a place of its own.
"""

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["uipe_merge", "yaml", "tomllib", "zipfile"]):
    import fuzzing

WORDS = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    '""',
    '"a"',
    "0",
    "-0",
    "1",
    "-1",
    "1e5",
    "1e400",
    "0.5",
    "null",
    "true",
    "false",
    "NaN",
    "Infinity",
    "-Infinity",
    ".inf",
    "~",
    "-",
    "&",
    "*",
    "!",
    "|",
    "9223372036854775807",
    "18446744073709551616",
    "\\u0000",
    "\\ud800",
    "\\n",
    "../",
    "/",
    "..",
    "lora_A",
    "lora_B",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "(.*)*",
    "(a|a)*",
    "[^.]",
    "\\\\d+",
    "alpha",
    "alpha_rules",
    "match",
    "along",
    "away_from",
    "original",
    "new",
    "old",
    "beta",
    "add",
    "rank",
    "energy",
    "seed",
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "F32",
    "BF16",
    "weight_map",
    "schema",
    "files",
    "size",
    "sha256",
    "results",
    "agg_value",
    "variant",
    "alpha",
]


def main() -> None:
    """Fuzz until the time is over; a broken property ends the process with its traceback."""
    name, seconds, *rest = sys.argv[1:]
    corpus = Path(rest[0] if rest else ".fuzz", name)
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(fuzzing.seeds()[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
        fuzzing.TARGETS[name](seed)  # what is imported on the way takes no input's time
    words = corpus.with_suffix(".dict")
    lines = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS)
    words.write_text("".join(f'"{line}"\n' for line in lines))
    options = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-max_len=4096",
        f"-dict={words}",
        f"-artifact_prefix={corpus.parent}/{name}-",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], fuzzing.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
