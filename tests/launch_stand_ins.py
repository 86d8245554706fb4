"""Plays the commands that the scripts of launch/ call: gcloud, srun, scontrol, sbatch, python.

stage.py starts it as `launch_stand_ins.py NAME ARGUMENT ...`; the variable STAND_IN is a folder. It
appends each call to the folder's calls.jsonl, and then acts by the folder's scenario.json.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

FOLDER = pathlib.Path(os.environ.get("STAND_IN", ""))
SCENARIO = FOLDER / "scenario.json"
WORKERS = [FOLDER / "worker0", FOLDER / "worker1"]  # their home folders


def note(file: str, what) -> None:
  with (FOLDER / file).open("a") as lines:
    lines.write(json.dumps(what) + "\n")


def gcloud(scenario: dict, arguments: list[str]) -> int:
  """A slice of two workers; commands for the workers are really run, on this machine.

  The scenario's `lives` has an entry for each time that the slice is created:
    states: what `describe` answers, one after the other; the last one stays.
    questions: how often the workers tell their status before `end` happens.
    end: a state, with which ssh stops working for all workers; "one lost": it stops for one worker;
      "offline": this machine has no network for ten calls.
    dead: ssh never works.
  """
  verb = arguments[3]
  life = scenario["lives"][scenario["life"]] if scenario["exists"] else None
  if scenario.get("offline"):
    scenario["offline"] -= 1
    return _failed("the network is unreachable", 255 if verb == "ssh" else 1)
  if verb == "create":
    scenario["life"] += 1
    scenario["exists"] = True
    for worker in WORKERS:
      worker.mkdir()
  elif life is None:
    return _failed("NOT_FOUND: Resource 'projects/p/...' was not found")
  elif verb == "delete":
    scenario["exists"] = False
    _take_workers_away()
  elif verb == "describe":
    life["state"] = life["states"].pop(0) if len(life["states"]) > 1 else life["states"][0]
    print(life["state"])
  elif life["state"] != "ACTIVE" or life.get("dead"):
    return _failed("ssh: connect to host: Connection timed out", 255)
  elif verb == "scp":
    for worker in WORKERS:
      shutil.copy(arguments[4], worker / arguments[5].split(":")[1])
  elif verb == "ssh":
    return _ssh(scenario, life, arguments)
  return 0


def _ssh(scenario: dict, life: dict, arguments: list[str]) -> int:
  [command] = [a.removeprefix("--command=") for a in arguments if a.startswith("--command=")]
  if " status;" in command and "questions" in life:
    life["questions"] -= 1
    if life["questions"] < 0:
      end = life["end"]
      del life["questions"]
      if end == "offline":
        scenario["offline"] = 10
      elif end == "one lost":
        life["lost"] = 1
      else:
        life["states"], life["dead"] = [end], True
        _take_workers_away()
      return _failed("client_loop: send disconnect: Broken pipe", 255)
  lost = life.get("lost", 0)
  workers = [
    subprocess.Popen(["bash", "-c", command], cwd=w, env={**os.environ, "HOME": str(w)})
    for w in WORKERS[lost:]
  ]
  status = max(worker.wait() for worker in workers)
  return _failed("ssh: connect to host: Connection timed out", 255) if lost else status


def _failed(message: str, status: int = 1) -> int:
  print(f"ERROR: (gcloud) {message}", file=sys.stderr)
  return status


def _take_workers_away() -> None:
  end_sessions(FOLDER)
  for worker in WORKERS:
    shutil.rmtree(worker, ignore_errors=True)


def end_sessions(folder: pathlib.Path) -> None:
  """Kills the trainings that were started on the workers, and their supervisors."""
  sessions = folder / "sessions.jsonl"
  for session in sessions.read_text().split() if sessions.exists() else []:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(int(session), signal.SIGKILL)


def python(scenario: dict, arguments: list[str]) -> int:
  """The workers' Python: `trainings` has a list for each start of training, with an end per worker.

  An end is an exit status; "term": 143, on SIGTERM; "1 second": 1, once another worker waits for
  SIGTERM; "kill": SIGKILL, for its supervisor too.
  """
  if arguments[:2] != ["-m", "train.main"]:
    return 0
  home = pathlib.Path(os.environ["HOME"])
  if os.getsid(0) == int(os.environ["TEST_SESSION"]):
    return 99  # not in a session of its own: killing it would kill the tests
  note("sessions.jsonl", os.getsid(0))
  note(f"{home.name}.jsonl", arguments[2:])
  starts = len((FOLDER / f"{home.name}.jsonl").read_text().splitlines())
  end = scenario["trainings"][starts - 1][int(home.name[-1])]
  if end == "term":
    _wait_for(signal.SIGTERM)
    note(f"{home.name}.saved", os.environ.get("FLAVOUR", ""))
    return 143
  if end == "1 second":
    while not (FOLDER / "waiting.jsonl").exists():
      time.sleep(0.01)
    return 1
  if end == "kill":
    while not (home / "mlp_models_run" / "pid").exists():
      time.sleep(0.01)
    os.killpg(os.getsid(0), signal.SIGKILL)
  return end


def _wait_for(signum: int, seconds: float = 120) -> bool:
  got = []
  signal.signal(signum, lambda *_: got.append(signum))
  note("waiting.jsonl", os.getpid())
  deadline = time.monotonic() + seconds
  while not got and time.monotonic() < deadline:
    time.sleep(0.01)
  return bool(got)


def srun(scenario: dict, arguments: list[str]) -> int:
  """Ends with the exit status `srun`; "usr1": 138, on USR1; "term": 143, as when SLURM ends it."""
  end = scenario["srun"]
  signal.signal(signal.SIGTERM, lambda *_: os._exit(137))  # the real one kills its tasks
  if end == "usr1":
    _wait_for(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(200))  # a second one: not saved
    time.sleep(0.3)  # saving
    return 138
  if end == "term":
    return 200 if _wait_for(signal.SIGUSR1, 0.3) else 143
  return end


def scontrol(scenario: dict, arguments: list[str]) -> int:
  if "show" in arguments:
    print(f"JobId=7 JobName=mlp_models JobState={scenario['job']} Reason=None Dependency=(null)")
  return 0


def main() -> int:
  name, *arguments = sys.argv[1:]
  note("calls.jsonl", [name, *arguments])
  if name not in ("gcloud", "python", "srun", "scontrol"):
    return 0
  scenario = json.loads(SCENARIO.read_text())
  status = globals()[name](scenario, arguments)
  if name == "gcloud":
    # Atomically: a training that starts now reads it.
    SCENARIO.with_suffix(".new").write_text(json.dumps(scenario))
    SCENARIO.with_suffix(".new").replace(SCENARIO)
  return status


if __name__ == "__main__":
  sys.exit(main())
