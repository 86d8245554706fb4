"""launch/: its scripts are run by bash for real; what they call is played by launch_stand_ins."""

import collections
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from launch_stand_ins import end_sessions

TESTS = pathlib.Path(__file__).parent
LAUNCH = TESTS.parent / "launch"


class Stage:
  """A folder with the stand-ins, first on the PATH, and with what they note."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.bin = folder / "bin"
    self.bin.mkdir()
    self.processes = []
    self.environment = {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      "HOME": str(folder),
      "STAND_IN": str(folder),
      "TEST_SESSION": str(os.getsid(0)),
    }

  def play(self, *stand_ins: str, **scenario) -> None:
    for name in stand_ins:
      path = self.bin / name
      path.write_text(
        f'#!/bin/sh\nexec {sys.executable} -IS {TESTS}/launch_stand_ins.py {name} "$@"\n'
      )
      path.chmod(0o755)
    (self.folder / "scenario.json").write_text(json.dumps(scenario))

  def start(self, *command: str) -> subprocess.Popen:
    process = subprocess.Popen(
      command,
      env=self.environment,
      cwd=self.folder,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    self.processes.append(process)
    return process

  def run(self, *command: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    return self.finish(self.start(*command))

  def finish(self, process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors

  def notes(self, file: str) -> list:
    path = self.folder / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def calls(self) -> list[list[str]]:
    return self.notes("calls.jsonl")

  def wait_for(self, file: str, count: int = 1) -> list:
    deadline = time.monotonic() + 60
    while len(self.notes(file)) < count:
      assert time.monotonic() < deadline, f"{file} has no {count} lines"
      time.sleep(0.01)
    return self.notes(file)


@pytest.fixture
def stage(tmp_path):
  stage = Stage(tmp_path)
  yield stage
  for process in stage.processes:  # those of a test that has failed
    process.kill()


# --- TPU VMs --------------------------------------------------------------------------------------

TPU = str(LAUNCH / "tpu_vm.sh")
ACTIVE = {"states": ["ACTIVE"]}
RUN = (TPU, "run", "--config", "configs/mixer.py", "--config.data.train_split=train[:10] or 'so'")
TRAINED = ["--workdir", "gs://b/w", *RUN[2:]]
WHERE = ["--project=p", "--zone=z", "--quiet"]
CREATE = [
  *("gcloud", "compute", "tpus", "queued-resources", "create", "mlp-models"),
  *("--node-id=mlp-models", "--accelerator-type=v5litepod-16"),
  *("--runtime-version=v2-alpha-tpuv5-lite", "--spot", *WHERE),
]
DELETE = [*CREATE[:4], "delete", "mlp-models", "--force", *WHERE]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
  """A checkout with one commit: launch/, and what the workers' pip reads."""
  folder = tmp_path_factory.mktemp("repository")
  shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
  git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.com"]
  for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=All"]):
    subprocess.run([*git, *command], check=True)
  return folder


@pytest.fixture
def tpu(stage, repository):
  """A stage with the settings of tpu_vm.sh, and nothing left running at the end."""
  if not shutil.which("flock") or not shutil.which("setsid"):
    pytest.skip("TPU workers run Linux: no flock or setsid here")
  stage.environment |= {
    "PROJECT": "p",
    "ZONE": "z",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "WORKDIR": "gs://b/w",
    "REPO": str(repository),
    "TRAIN_ENV": "FLAVOUR=plum",
    "PYTHON": str(stage.bin / "python"),  # the workers'
    "POLL_SECONDS": "0.01",
    "SSH_TRIES": "3",
    "STRAGGLER_POLLS": "9999",  # polls are quick here, and a busy machine slow
  }
  yield stage
  end_sessions(stage.folder)


def play_tpu(stage, lives, trainings):
  stage.play("gcloud", "python", lives=lives, trainings=trainings, life=-1, exists=False)


def verbs(stage) -> dict[str, int]:
  """How often each command of gcloud was called."""
  return collections.Counter(call[4] for call in stage.calls() if call[0] == "gcloud")


def trainings(stage) -> list[int]:
  """How often training was started on each worker; each time as it should be."""
  started = [stage.notes(f"worker{i}.jsonl") for i in range(2)]
  assert all(arguments == TRAINED for worker in started for arguments in worker)
  return [len(worker) for worker in started]


def test_tpu_run_creates_sets_up_and_trains(tpu, repository):
  play_tpu(tpu, [{"states": ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]}], [[0, 0]])
  status, output, errors = tpu.run(*RUN)
  assert (status, errors) == (0, "")
  assert "training has finished" in output
  calls = [call for call in tpu.calls() if call[0] == "gcloud"]
  assert [call[4] for call in calls[:7]] == [
    *("describe", "create", "describe", "describe", "describe"),
    *("ssh", "ssh"),  # what is there? what still runs there ends
  ]
  assert calls[1] == CREATE
  [scp] = [call for call in calls if call[4] == "scp"]
  assert scp[3:5] == ["tpu-vm", "scp"] and scp[6:8] == ["mlp-models:mlp_models.tar", "--worker=all"]
  assert all(call[5:7] == ["mlp-models", "--worker=all"] for call in calls if call[4] == "ssh")
  assert trainings(tpu) == [1, 1]
  pip = [call[1:] for call in tpu.calls() if call[:3] == ["python", "-m", "pip"]]
  assert pip == 2 * [
    *([shlex.split("-m pip install --quiet --constraint constraints.txt --editable .[tpu,gcs]")]),
  ]
  commit = subprocess.check_output(["git", "-C", repository, "rev-parse", "HEAD"], text=True)
  assert (tpu.folder / "worker1/mlp_models_run/commit").read_text() == commit
  assert verbs(tpu)["delete"] == 0


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_tpu_preempted_run_is_created_anew_and_resumes(state, tpu):
  play_tpu(tpu, [ACTIVE | {"questions": 3, "end": state}, ACTIVE], [["term"] * 2, [0, 0]])
  status, output, _ = tpu.run(*RUN)
  assert status == 0
  assert f"mlp-models is {state}" in output
  calls = [c for c in tpu.calls() if c[0] == "gcloud" and c[4] in ("create", "delete", "scp")]
  assert [call[4] for call in calls] == ["create", "scp", "delete", "create", "scp"]
  assert calls[2] == DELETE and calls[3] == CREATE
  assert trainings(tpu) == [2, 2]


def test_tpu_slice_of_which_a_worker_no_longer_answers_is_replaced(tpu):
  play_tpu(tpu, [ACTIVE | {"questions": 3, "end": "one lost"}, ACTIVE], [["term"] * 2, [0, 0]])
  assert tpu.run(*RUN)[0] == 0
  assert (verbs(tpu)["create"], verbs(tpu)["delete"]) == (2, 1)
  unanswered = [call[4] for call in tpu.calls() if call[0] == "gcloud"]
  lost = unanswered.index("delete")
  assert unanswered[lost - 6 : lost] == 3 * ["ssh", "describe"]  # SSH_TRIES=3


def test_tpu_slice_that_ssh_does_not_reach_is_left_alone(tpu):
  play_tpu(tpu, [ACTIVE | {"questions": 3, "end": "ACTIVE"}], [["term"] * 2])
  status, _, errors = tpu.run(*RUN)
  assert status == 1
  assert "ssh reaches none of mlp-models any more, which is ACTIVE: training may go on" in errors
  assert (verbs(tpu)["create"], verbs(tpu)["delete"], trainings(tpu)) == (1, 0, [1, 1])


def test_tpu_run_sits_out_a_network_that_is_down_here(tpu):
  play_tpu(tpu, [ACTIVE | {"questions": 3, "end": "offline"}], [["term"] * 2])
  run = tpu.start(*RUN)
  tpu.wait_for("waiting.jsonl", 2)
  while json.loads((tpu.folder / "scenario.json").read_text()).get("offline") != 0:
    assert run.poll() is None
    time.sleep(0.02)
  assert tpu.run(TPU, "stop")[0] == 0
  assert tpu.finish(run)[0] == 143
  assert (verbs(tpu)["create"], verbs(tpu)["delete"], trainings(tpu)) == (1, 0, [1, 1])


@pytest.mark.parametrize("ends", [[2, 2], [1, 134]])
def test_tpu_failed_training_is_not_started_again(ends, tpu):
  play_tpu(tpu, [ACTIVE], [ends])
  status, _, errors = tpu.run(*RUN)
  assert status == ends[0]
  assert f"error: training failed with status {ends[0]}: " in errors
  assert (verbs(tpu)["create"], verbs(tpu)["delete"], trainings(tpu)) == (1, 0, [1, 1])


def test_tpu_training_that_fails_since_the_slice_goes_is_started_again(tpu):
  play_tpu(tpu, [{"states": ["ACTIVE", "SUSPENDING", "SUSPENDED"]}, ACTIVE], [[1, 1], [0, 0]])
  assert tpu.run(*RUN)[0] == 0
  assert (verbs(tpu)["create"], verbs(tpu)["delete"], trainings(tpu)) == (2, 1, [2, 2])


@pytest.mark.parametrize("ends", [[143, 143], [138, 0], [1, "kill"]])
def test_tpu_interrupted_training_is_started_again_in_place(ends, tpu):
  tpu.environment["MAX_CRASHES"] = "0"  # it is not one
  play_tpu(tpu, [ACTIVE], [ends, [0, 0]])
  assert tpu.run(*RUN)[0] == 0
  assert (verbs(tpu)["create"], verbs(tpu)["scp"], trainings(tpu)) == (1, 1, [2, 2])


def test_tpu_crashes_are_counted(tpu):
  tpu.environment["MAX_CRASHES"] = "1"
  play_tpu(tpu, [ACTIVE], 3 * [[139, 139]])
  status, _, errors = tpu.run(*RUN)
  assert status == 1
  assert "training ended 2 times with a status like 139" in errors
  assert trainings(tpu) == [2, 2]


def test_tpu_crashes_after_long_training_are_not_added_up(tpu):
  tpu.environment |= {"MAX_CRASHES": "1", "CRASH_SECONDS": "0"}
  play_tpu(tpu, [ACTIVE], [*3 * [[139, 139]], [0, 0]])
  assert tpu.run(*RUN)[0] == 0
  assert trainings(tpu) == [4, 4]


def test_tpu_worker_that_waits_for_a_failed_one_is_ended(tpu):
  tpu.environment["STRAGGLER_POLLS"] = "3"
  play_tpu(tpu, [ACTIVE], [["1 second", "term"]])
  assert tpu.run(*RUN)[0] == 1
  assert tpu.notes("worker1.saved") == ["plum"]
  assert trainings(tpu) == [1, 1]


def test_tpu_training_outlives_run_which_follows_again_until_stop(tpu):
  play_tpu(tpu, [ACTIVE], [["term"] * 2])
  first = tpu.start(*RUN)
  tpu.wait_for("waiting.jsonl", 2)
  first.send_signal(signal.SIGINT)
  status, output, _ = tpu.finish(first)
  assert status == 130 and "training goes on" in output
  second = tpu.start(*RUN)
  asked = verbs(tpu)["ssh"]
  while verbs(tpu)["ssh"] < asked + 3:
    assert second.poll() is None
    time.sleep(0.02)
  status, output, _ = tpu.run(TPU, "stop")
  assert status == 0
  assert [line.split()[3:] for line in output.splitlines()] == 2 * [["143", "stop"]]
  status, output, _ = tpu.finish(second)
  assert status == 143
  assert "following it" in output and "saved and stopped" in output
  assert trainings(tpu) == [1, 1]
  assert tpu.notes("worker0.saved") == tpu.notes("worker1.saved") == ["plum"]


def test_tpu_refused_request_is_not_made_for_ever(tpu):
  tpu.environment["MAX_REQUESTS"] = "3"
  play_tpu(tpu, 4 * [{"states": ["FAILED"]}], [])
  status, _, errors = tpu.run(TPU, "create")
  assert (status, verbs(tpu)["create"]) == (1, 3)
  assert "no mlp-models after 3 tries" in errors


def test_tpu_unreachable_from_the_first_is_not_replaced(tpu):
  play_tpu(tpu, [ACTIVE | {"dead": True}], [])
  status, _, errors = tpu.run(*RUN)
  assert (status, verbs(tpu)["create"], verbs(tpu)["delete"]) == (1, 1, 0)
  assert "error: ssh does not reach the workers of mlp-models" in errors


def test_tpu_setup_status_logs_and_delete(tpu):
  play_tpu(tpu, [ACTIVE], [])
  assert tpu.run(TPU, "create")[0] == 0
  status, output, _ = tpu.run(TPU, "status")
  lines = output.splitlines()
  assert (status, lines[-3]) == (0, "mlp-models ACTIVE")
  assert [line.split()[2:] for line in lines[-2:]] == 2 * [["-", "new", "-"]]
  assert tpu.run(TPU, "setup")[0] == 0
  assert [line.split()[3] for line in tpu.run(TPU, "status")[1].splitlines()[-2:]] == 2 * ["idle"]
  assert tpu.run(TPU, "delete")[0] == 0
  assert tpu.calls()[-1] == DELETE
  assert tpu.run(TPU, "logs")[0] == 1  # there is no worker any more
  logs = tpu.calls()[-1]
  assert logs[4:8] == [
    *("ssh", "mlp-models", "--worker=0", "--command=tail -n 100 -F mlp_models_run/log"),
  ]


@pytest.mark.parametrize("command", ["create", "setup", "run", "status", "logs", "stop", "delete"])
def test_tpu_dry_run_prints_every_command_and_runs_none(command, tpu):
  play_tpu(tpu, [ACTIVE], [[0, 0]])
  arguments = RUN[2:] if command == "run" else ()
  status, output, errors = tpu.run(TPU, "--dry-run", command, *arguments)
  assert (status, errors, tpu.calls()) == (0, "", [])
  printed = [shlex.split(line, comments=True) for line in output.splitlines()]
  printed = [line[4] if line[0] == "gcloud" else line[3] for line in printed if line]
  expected = {
    "create": ["describe", "create", "describe"],
    "setup": ["ssh", "archive", "scp", "ssh"],
    "run": [
      *("describe", "create", "describe", "ssh", "ssh", "archive", "scp", "ssh", "ssh", "ssh"),
      "delete",  # after a preemption
    ],
    "status": ["describe", "ssh"],
    "logs": ["ssh"],
    "stop": ["ssh"],
    "delete": ["delete"],
  }
  assert printed == expected[command]
  if command == "run":  # what is printed is what is run
    assert shlex.join(CREATE) in [shlex.join(shlex.split(line)) for line in output.splitlines()[:2]]


@pytest.mark.parametrize(
  ("arguments", "settings", "message"),
  [
    (["run", "--config", "c"], {"PROJECT": "", "WORKDIR": ""}, "set PROJECT, WORKDIR"),
    (["create"], {"ACCELERATOR_TYPE": "v9-8"}, "set RUNTIME_VERSION"),
    (["delete"], {"ZONE": ""}, "set ZONE"),
    (["run", "--config", "c"], {"WORKDIR": "runs/x"}, "WORKDIR=runs/x: it must be gs://"),
    (["run", "--config", "c", "--workdir=x"], {}, "set WORKDIR, and leave --workdir out"),
    (["run"], {}, "run needs --config"),
    (["stop", "now"], {}, "stop takes no arguments"),
    (["strat"], {}, "unknown command 'strat'"),
    ([], {}, "a command is missing"),
    (["create"], {"REF": "no-such"}, "has no commit REF=no-such"),
  ],
)
def test_tpu_wrong_call_is_one_line(arguments, settings, message, tpu):
  play_tpu(tpu, [ACTIVE], [])
  tpu.environment |= settings
  status, output, errors = tpu.run(TPU, *arguments)
  assert (status, output, tpu.calls()) == (2, "", [])
  assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1


def test_tpu_help_is_the_head_of_the_script(stage):
  status, output, _ = stage.run(TPU, "--help")
  assert status == 0
  assert output.startswith("Trains on a TPU slice") and "143 ended by `stop`." in output
  assert not output.splitlines()[-1].startswith("set ")


# --- SLURM ----------------------------------------------------------------------------------------

SBATCH = str(LAUNCH / "slurm.sbatch")
JOB = {
  "SLURM_JOB_ID": "7",
  "SLURM_SUBMIT_DIR": str(TESTS.parent),
  "SLURM_CPUS_PER_TASK": "8",
  "SLURM_GPUS_ON_NODE": "8",
  "SLURM_NTASKS_PER_NODE": "8",
  "PYTHON": "python3",
}
STEP = [
  *("srun", "--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=8", "python3", "-m"),
  *("train.main", "--workdir", "runs/slurm-7", "--config", "configs/mixer.py"),
]
SHOW, REQUEUE = ["scontrol", "--oneliner", "show", "job", "7"], ["scontrol", "requeue", "7"]


def play_slurm(stage, srun, job="RUNNING") -> subprocess.Popen:
  """The started script, in a job of SLURM."""
  stage.play("srun", "scontrol", "sbatch", srun=srun, job=job)
  stage.environment |= JOB | stage.environment
  return stage.start("bash", SBATCH, *STEP[-2:])


@pytest.mark.parametrize("status", [0, 1, 2, 134])
def test_slurm_job_that_ends_by_itself_is_not_requeued(status, stage):
  assert stage.finish(play_slurm(stage, srun=status))[0] == status
  assert stage.calls() == [STEP]


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_signal_reaches_the_step_and_the_job_is_requeued(signum, stage):
  job = play_slurm(stage, srun="usr1")
  stage.wait_for("waiting.jsonl")
  job.send_signal(signum)
  status, output, _ = stage.finish(job)
  assert status == 138  # TERM too: srun would kill the tasks for it
  assert "requeueing" in output
  asked = [SHOW, SHOW] if signum == signal.SIGTERM else []
  assert stage.calls() == [STEP, *asked, REQUEUE]


def test_slurm_second_signal_is_kept_from_the_step(stage):
  job = play_slurm(stage, srun="usr1")
  stage.wait_for("waiting.jsonl")
  for _ in range(2):
    job.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
  assert stage.finish(job)[0] == 138  # the stand-in ends with 200 on a second one
  assert stage.calls() == [STEP, REQUEUE]


@pytest.mark.parametrize("state", ["COMPLETING", "PREEMPTED"])
def test_slurm_job_that_slurm_ends_is_left_to_slurm(state, stage):
  """scancel tells tasks and shell: the tasks not once more, and no job is back from the dead."""
  job = play_slurm(stage, srun="term", job=state)
  stage.wait_for("waiting.jsonl")
  job.send_signal(signal.SIGTERM)
  assert stage.finish(job)[0] == 143
  assert stage.calls() == [STEP, SHOW, SHOW]


def test_slurm_tasks_preempted_without_the_shell_are_requeued(stage):
  assert stage.finish(play_slurm(stage, srun=143))[0] == 143
  assert stage.calls() == [STEP, SHOW, REQUEUE]


def test_slurm_requeues_are_counted(stage):
  stage.environment |= {"MAX_REQUEUES": "3", "SLURM_RESTART_COUNT": "3"}
  status, output, _ = stage.finish(play_slurm(stage, srun=138))
  assert status == 138 and "MAX_REQUEUES=3" in output
  assert stage.calls() == [STEP, SHOW]


def test_slurm_dry_run_works_outside_slurm(stage):
  stage.play("srun", "scontrol", "sbatch")
  stage.environment |= {"REPO": str(TESTS.parent), "WORKDIR": "/shared/w", "SRUN_FLAGS": "-l -v"}
  status, output, errors = stage.run("bash", SBATCH, "--dry-run", *STEP[-2:])
  assert (status, errors, stage.calls()) == (0, "", [])
  assert output.splitlines() == [
    "srun --kill-on-bad-exit=0 --wait=300 -l -v .venv/bin/python -m train.main"
    " --workdir /shared/w --config configs/mixer.py",
    "# if it ends with status 138 or 143:",
    "scontrol requeue JOBID",
  ]


@pytest.mark.parametrize(
  ("settings", "arguments", "message"),
  [
    ({}, [], "arguments are missing"),
    ({}, ["--config", "c", "--workdir", "w"], "set WORKDIR, and leave --workdir out"),
    ({"SLURM_SUBMIT_DIR": "/"}, ["--config", "c"], "REPO=/ is not the repository"),
    ({"SLURM_JOB_ID": ""}, ["--config", "c"], "this is a job: sbatch launch/slurm.sbatch"),
    ({"SLURM_GPUS_PER_TASK": "1"}, ["--config", "c"], "leave --gpus-per-task out"),
    ({"SLURM_GPUS_ON_NODE": "4"}, ["--config", "c"], "--ntasks-per-node=8 with 4 GPUs a node"),
    ({"PYTHON": "no/python"}, ["--config", "c"], "PYTHON=no/python is not there"),
  ],
)
def test_slurm_wrong_call_is_one_line(settings, arguments, message, stage):
  stage.play("srun", "scontrol")
  stage.environment |= JOB | settings
  status, output, errors = stage.run("bash", SBATCH, *arguments)
  assert (status, output, stage.calls()) == (2, "", [])
  assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1


def test_slurm_directives_come_before_the_first_command():
  """SLURM reads none after it."""
  lines = pathlib.Path(SBATCH).read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
  directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
  assert not any(line.startswith("#SBATCH") for line in lines[first:])
  assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(directives)
  assert not any("gpus-per-task" in directive for directive in directives)


# --- Kubernetes -----------------------------------------------------------------------------------


def jobset(kind: str) -> dict:
  """kubernetes.yaml for GPUs, or for TPUs as its head says how."""
  text = (LAUNCH / "kubernetes.yaml").read_text()
  if kind == "tpu":
    [command] = re.findall(r"^#   (sed .*) \| kubectl", text, re.MULTILINE)
    text = subprocess.check_output(shlex.split(command), cwd=TESTS.parent, text=True)
  return yaml.safe_load(text)


def check_schema(document: dict) -> None:
  """Raises where a field is unknown, missing or of the wrong type."""
  # The models drop unknown fields instead of refusing them.
  assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document


def worker(document: dict) -> dict:
  [replicated] = document["spec"]["replicatedJobs"]
  return replicated["template"]["spec"]


def container(document: dict) -> dict:
  [train] = worker(document)["template"]["spec"]["containers"]
  return train


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_kubernetes_follows_the_schema(kind):
  check_schema(jobset(kind))


@pytest.mark.parametrize(
  "spoil",
  [
    lambda d: d["spec"]["failurePolicy"].update(maxRestart=3),
    lambda d: d["spec"]["failurePolicy"].update(maxRestarts="3"),
    lambda d: d["spec"]["failurePolicy"]["rules"][0].update(onJobFailureReason=["x"]),
    lambda d: d["spec"]["coordinator"].update(replicatedJobs="worker"),
    lambda d: worker(d).update(backofflimit=0),
    lambda d: worker(d)["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=["138"]),
    lambda d: worker(d)["template"]["spec"].update(terminationGracePeriod=60),
    lambda d: container(d).update(command="bash"),
    lambda d: container(d).pop("name"),
  ],
)
def test_kubernetes_schema_check_finds_mistakes(spoil):
  document = jobset("gpu")
  spoil(document)
  with pytest.raises((AssertionError, ValueError)):
    check_schema(document)


def outcome(document: dict, status: int, disrupted: bool) -> str:
  """What a pod's end comes to, by the rules of Job and JobSet: the first that fits counts."""
  reason = "BackoffLimitExceeded"  # backoffLimit is 0
  for rule in worker(document)["podFailurePolicy"]["rules"]:
    if codes := rule.get("onExitCodes"):
      assert (codes["operator"], codes["containerName"]) == ("In", container(document)["name"])
      assert codes["values"] == sorted(codes["values"])  # Kubernetes asks for it
      fits = status in codes["values"]
    else:
      assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
      fits = disrupted
    if fits:
      if rule["action"] == "Ignore":
        return "pod replaced"
      assert rule["action"] == "FailJob"
      reason = "PodFailurePolicy"
      break
  for rule in document["spec"]["failurePolicy"]["rules"]:
    if reason in rule["onJobFailureReasons"]:
      return rule["action"]
  return "RestartJobSet"  # the default


@pytest.mark.parametrize(
  ("status", "disrupted", "expected"),
  [
    (143, False, "pod replaced"),
    (138, False, "pod replaced"),
    (143, True, "pod replaced"),
    (137, True, "pod replaced"),
    (1, True, "pod replaced"),
    (1, False, "FailJobSet"),
    (2, False, "FailJobSet"),
    (134, False, "RestartJobSet"),
    (137, False, "RestartJobSet"),
  ],
)
def test_kubernetes_what_is_started_again(status, disrupted, expected):
  assert outcome(jobset("gpu"), status, disrupted) == expected


@pytest.mark.parametrize(
  ("kind", "nodes", "resources"),
  [("gpu", 2, {"nvidia.com/gpu": 8}), ("tpu", 4, {"google.com/tpu": 4})],
)
def test_kubernetes_numbers_agree(kind, nodes, resources):
  job = worker(jobset(kind))
  pod, train = job["template"]["spec"], container(jobset(kind))
  environment = {variable["name"]: variable.get("value") for variable in train["env"]}
  assert job["parallelism"] == job["completions"] == int(environment["PROCESSES"]) == nodes
  assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
  assert pod["restartPolicy"] == "Never"
  assert pod["shareProcessNamespace"]  # or Python is deaf to SIGTERM while it starts
  assert pod["terminationGracePeriodSeconds"] > 30  # what training takes to save
  assert train["resources"] == {"limits": resources}
  assert ("nodeSelector" in pod) == (kind == "tpu")


def start_pod(stage, kind: str, getent: str) -> subprocess.Popen:
  """The container's command, with a `getent` that is this shell command."""
  stage.play("python")
  stage.environment |= {
    "WORKDIR": "gs://b/w",
    "PROCESSES": "2",
    "COORDINATOR": "mlp-models-worker-0-0.mlp-models",
    "JOB_COMPLETION_INDEX": "1",
  }
  for name, command in {"getent": getent, "sleep": "exec /bin/sleep 0.01"}.items():
    (stage.bin / name).write_text(
      f'#!/bin/sh\necho "\\"$2\\"" >>{stage.folder}/{name}.jsonl\n{command}\n'
    )
    (stage.bin / name).chmod(0o755)
  train = container(jobset(kind))
  return stage.start(*train["command"], *train["args"])


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_kubernetes_pod_trains_once_all_pods_are_there(kind, stage):
  (stage.folder / "scenario.json").write_text("{}")
  pods = [f"mlp-models-worker-0-{i}.mlp-models" for i in range(2)]
  pod = start_pod(stage, kind, f'[ "$(grep -c . {stage.folder}/getent.jsonl)" -ge 3 ]')
  stage.finish(pod)
  assert stage.notes("getent.jsonl") == [pods[0], pods[0], pods[0], pods[1]]
  where = ["--coordinator", f"{pods[0]}:8476", "--processes", "2", "--process_id", "1"]
  assert stage.calls() == [
    [
      *("python", "-m", "train.main", "--workdir", "gs://b/w"),
      *(where if kind == "gpu" else ()),
      *("--config", "configs/mixer.py"),
    ]
  ]


def test_kubernetes_pod_that_waits_ends_on_sigterm(stage):
  pod = start_pod(stage, "gpu", "exit 2")
  stage.wait_for("getent.jsonl", 3)
  pod.send_signal(signal.SIGTERM)
  assert stage.finish(pod)[0] == -signal.SIGTERM  # which a container has as 143
  assert stage.calls() == []


# --- All ------------------------------------------------------------------------------------------


def test_shell_scripts_pass_shellcheck():
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
  assert len(scripts) == 3
  subprocess.run([shellcheck, *scripts], check=True)
