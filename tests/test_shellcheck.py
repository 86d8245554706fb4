"""shellcheck on the shell scripts of launch/."""

import subprocess
import sys
from pathlib import Path

from stage import LAUNCH


def test_shell_scripts_pass_shellcheck():
  shellcheck = Path(sys.executable).with_name("shellcheck")
  scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
  assert len(scripts) == 4
  subprocess.run([shellcheck, *scripts], check=True)
