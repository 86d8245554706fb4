"""launch/slurm.sbatch, run by bash; launch_stand_ins.py plays srun and scontrol."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from stage import LAUNCH, REPOSITORY, Stage

SBATCH = str(LAUNCH / "slurm.sbatch")
JOB = {
  "SLURM_JOB_ID": "7",
  "SLURM_SUBMIT_DIR": str(REPOSITORY),
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


@pytest.fixture
def stage(tmp_path):
  with Stage(tmp_path) as stage:
    yield stage


def play_slurm(stage: Stage, srun: int | str, job: str = "RUNNING") -> subprocess.Popen:
  """Starts the script as a job of SLURM."""
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
  """scancel signals tasks and shell: the shell neither signals the tasks again nor requeues."""
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
  stage.environment |= {"REPO": str(REPOSITORY), "WORKDIR": "/shared/w", "SRUN_FLAGS": "-l -v"}
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
  """SLURM ignores those after it."""
  lines = Path(SBATCH).read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
  directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
  assert not any(line.startswith("#SBATCH") for line in lines[first:])
  assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= set(directives)
  assert not any("gpus-per-task" in directive for directive in directives)
