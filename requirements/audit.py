"""Compares the locked packages with the published advisories: `make audit`.

Exits with 1 if one has a known vulnerability. Without access to an advisory database it says so and exits with 0: no
build may depend on that service, but none may claim that the audit was done either. `make check` runs it.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCKS = sorted(Path(__file__).parent.glob("*.lock"))
SERVICES = ("pypi", "osv")


def audited(lines: list[str], service: str) -> list[dict[str, Any]] | None:
    """What pip-audit says about pinned requirements; None if the service did not answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        command = ["-m", "pip_audit", "-s", service, "-r", file.name, "--no-deps", "--disable-pip", "--format", "json"]
        done = subprocess.run([sys.executable, *command, "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        return list(json.loads(done.stdout)["dependencies"])
    except ValueError:
        return None


def main() -> int:
    text = "\n".join(lock.read_text(encoding="utf-8") for lock in LOCKS)
    pins = list({line.split()[0]: line for line in re.findall(r"^[\w.-]+==[^\\\n]+", text, re.MULTILINE)}.values())
    for service in SERVICES:
        # one package first, so that a registry without advisories is not asked for all of them
        probe = audited(pins[:1], service)
        if not probe or "skip_reason" in probe[0]:
            continue
        found = audited(pins, service) or []
        known = {one["name"]: one for one in found if "skip_reason" not in one}
        bad = [one for one in known.values() if one["vulns"]]
        for one in bad:
            ids = ", ".join(vulnerability["id"] for vulnerability in one["vulns"])
            print(f"{one['name']} {one['version']}: {ids}")
        print(f"audit ({service}): {len(known)} packages compared, {len(bad)} with known vulnerabilities")
        return 1 if bad or not known else 0
    print(
        f"audit: NOT DONE for {len(pins)} packages, because no advisory database ({', '.join(SERVICES)}) answers here"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
