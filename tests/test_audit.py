"""`make audit`, with a stand-in for Python whose environments hold stand-ins for the tools."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
VENV = """#!/bin/sh
mkdir -p "$3/bin"
printf '#!/bin/sh\\n%s\\n' "$PLAY_PIP" > "$3/bin/python"
printf '#!/bin/sh\\n%s\\n' "$PLAY_AUDIT" > "$3/bin/pip-audit"
chmod +x "$3/bin/python" "$3/bin/pip-audit"
"""


@pytest.mark.parametrize(
  ("pip", "audit", "status", "output", "error"),
  [
    ("exit 0", "echo none >&2", 0, "no known vulnerability in ", ""),
    ("exit 0", "echo jax 0.1 CVE-1; exit 1", 2, "jax 0.1 CVE-1", ""),
    ("exit 0", "echo warning >&2; echo offline >&2; exit 1", 2, "", "not audited: offline"),
    ("echo no network >&2; exit 1", "exit 0", 2, "", "not audited: no network"),
  ],
)
def test_an_audit_tells_no_advisories_from_no_answer(pip, audit, status, output, error, tmp_path):
  python = tmp_path / "python"
  python.write_text(VENV)
  python.chmod(0o755)
  process = subprocess.run(
    ["make", "--silent", "audit", f"PYTHON={python}"],
    cwd=REPOSITORY,
    # Not the numbers of a make that runs this test: it would count its own.
    env=os.environ | {"MAKELEVEL": "", "MAKEFLAGS": "", "PLAY_PIP": pip, "PLAY_AUDIT": audit},
    capture_output=True,
    text=True,
  )
  assert process.returncode == status  # make's: 2 for any failure
  assert process.stdout.startswith(output) and bool(process.stdout) == bool(output)
  said = [line for line in process.stderr.splitlines() if not line.startswith("make: ***")]
  assert said == ([error] if error else [])
