"""Known holes in what ``constraints.txt`` pins, by pip-audit; ``make audit`` runs it.

Without a network, or where the registry at hand has no such records, nothing can be said: that is
told and is no failure. A hole is one, and so is anything else that goes wrong.
"""

import json
import re
import subprocess
import sys

_SECONDS = 600
_NO_NETWORK = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|Max retries exceeded|Name or service not known|"
    r"Temporary failure in name resolution|Tried to connect"
)


def main(requirements: str) -> int:
    """Audit a file of pins; return the exit code."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", requirements, "--no-deps"]
    command += ["--disable-pip", "--progress-spinner", "off", "--format", "json"]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        print("audit: could not be done: no answer in time")
        return 0
    try:
        found = json.loads(ended.stdout)["dependencies"]
    except (ValueError, LookupError, TypeError):
        if _NO_NETWORK.search(ended.stderr):
            print("audit: could not be done: no network")
            return 0
        print(ended.stderr, file=sys.stderr)
        return ended.returncode or 1
    audited = [each for each in found if "skip_reason" not in each]
    if not audited:
        print(f"audit: could not be done: the registry tells nothing of {len(found)} packages")
        return 0
    holes = [(each, hole) for each in audited for hole in each["vulns"]]
    for each, hole in holes:
        fixed = ", ".join(hole["fix_versions"]) or "nothing yet"
        print(f"{each['name']} {each['version']}: {hole['id']}, mended by {fixed}")
    print(f"audit: {len(holes)} known holes in {len(audited)} of {len(found)} packages")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
