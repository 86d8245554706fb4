"""launch/tpu_vm.sh, run by bash; launch_stand_ins.py plays gcloud, and bash its two workers."""

import collections
import json
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from launch_stand_ins import end_sessions
from stage import LAUNCH, Stage

pytestmark = pytest.mark.needs(what="linux")  # as the workers do

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
  """A checkout of launch/, with one commit."""
  folder = tmp_path_factory.mktemp("repository")
  shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
  git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.com"]
  for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=All"]):
    subprocess.run([*git, *command], check=True)
  return folder


@pytest.fixture
def tpu(tmp_path, repository):
  """A stage with the settings of tpu_vm.sh; at the end, nothing is left running on its workers."""
  with Stage(tmp_path) as stage:
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
      "STRAGGLER_POLLS": "9999",  # polls are quick here, but the machine may be busy
    }
    yield stage
    end_sessions(stage.folder)


def play_tpu(stage: Stage, lives: list[dict], trainings: list[list]) -> None:
  stage.play("gcloud", "python", lives=lives, trainings=trainings, life=-1, exists=False)


def verbs(stage: Stage) -> dict[str, int]:
  """How often each command of gcloud was called."""
  return collections.Counter(call[4] for call in stage.calls() if call[0] == "gcloud")


def trainings(stage: Stage) -> list[int]:
  """How often training was started on each worker; its arguments are checked."""
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
    *("ssh", "ssh"),  # asks for the status; ends what still runs
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
  assert "ssh no longer reaches mlp-models, which is ACTIVE: training may go on" in errors
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
  tpu.environment["MAX_CRASHES"] = "0"  # an interruption is none
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


def test_tpu_help_is_the_head_of_the_script(tpu):
  status, output, _ = tpu.run(TPU, "--help")
  assert status == 0
  assert output.startswith("Trains on a TPU slice") and "143 ended by `stop`." in output
  assert not output.splitlines()[-1].startswith("set ")
