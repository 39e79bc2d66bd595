"""`make audit`: known vulnerabilities of the installed packages, by pip-audit, where its data can be had."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SECONDS = 300


def main() -> None:
    """Print a line for each vulnerability; the exit status is 1 where there is one, 0 where none could be looked up."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"not audited: pip-audit got no answer within {SECONDS} s")
        return
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        lines = done.stderr.strip().splitlines() or ["no output"]
        print(f"not audited: {lines[-1][:200]}")
        return
    found = [(package, each) for package in packages for each in package.get("vulns", [])]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    looked_up = sum("vulns" in package for package in packages)
    if not looked_up:
        reasons = [str(package.get("skip_reason")) for package in packages]
        print(f"not audited: {(reasons or ['no package was found'])[0][:200]}")
        return
    print(f"{looked_up} packages, {len(found)} known vulnerabilities")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
