"""launch/kubernetes.yaml: its schema, its rules, and its container's command, run by bash."""

import re
import shlex
import signal
import subprocess

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from stage import LAUNCH, REPOSITORY, Stage


@pytest.fixture
def stage(tmp_path):
  with Stage(tmp_path) as stage:
    yield stage


def jobset(kind: str) -> dict:
  """kubernetes.yaml for GPUs, or for TPUs with the `sed` that its head shows."""
  text = (LAUNCH / "kubernetes.yaml").read_text()
  if kind == "tpu":
    [command] = re.findall(r"^#   (sed .*) \| kubectl", text, re.MULTILINE)
    text = subprocess.check_output(shlex.split(command), cwd=REPOSITORY, text=True)
  return yaml.safe_load(text)


def check_schema(document: dict) -> None:
  """Raises if a field is unknown, missing or of the wrong type."""
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
  """What Job and JobSet do when a pod ends, by their rules: the first match counts."""
  reason = "BackoffLimitExceeded"  # backoffLimit is 0
  for rule in worker(document)["podFailurePolicy"]["rules"]:
    if codes := rule.get("onExitCodes"):
      assert (codes["operator"], codes["containerName"]) == ("In", container(document)["name"])
      assert codes["values"] == sorted(codes["values"])  # required by Kubernetes
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
  assert pod["shareProcessNamespace"]  # or SIGTERM is ignored while Python starts
  assert pod["terminationGracePeriodSeconds"] > 30  # the time that training takes to save
  assert train["resources"] == {"limits": resources}
  assert ("nodeSelector" in pod) == (kind == "tpu")


def start_pod(stage: Stage, kind: str, getent: str) -> subprocess.Popen:
  """Starts the container's command; `getent` is a shell command."""
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
  assert stage.finish(pod)[0] == -signal.SIGTERM  # a container's exit status is 143
  assert stage.calls() == []
