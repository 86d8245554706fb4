#!/usr/bin/env bash
# Trains on a TPU slice of any number of workers, and goes on by itself after a preemption.
#
#   launch/tpu_vm.sh [--dry-run] COMMAND [ARGUMENT ...]
#
#   create   asks for the slice (a queued resource) and waits until it is there
#   setup    brings the code of REF onto all workers and installs it
#   run --config configs/mixer.py [--config.KEY=VALUE ...]
#            does both where needed, trains, and stays until training has ended. A slice that was
#            preempted or lost is deleted and asked for anew, and training resumes. Training does
#            not depend on this machine: `run` may be ended (Ctrl-C) or lose its connection; the
#            same command follows again, and restarts again where need be.
#   status   the state of the slice and of training on each worker
#   logs     the log of worker LOG_WORKER, as it grows
#   stop     has training save and stop, on all workers; a `run` that follows it then ends too
#   delete   deletes the slice; until then it costs money, and quota even where it is SUSPENDED
#
# --dry-run prints every command and runs none. Settings are variables of the environment:
#
#   PROJECT ZONE ACCELERATOR_TYPE WORKDIR=gs://BUCKET/mixer launch/tpu_vm.sh run ...
#
# Needs gcloud, logged in, and a bucket that the slice's service account may write to. Each worker
# prepares the data set by itself; TRAIN_ENV="TFDS_DATA_DIR=..." says where.
#
# Exit status of `run`: 0 finished; 1 and 2 training failed or was called wrongly (not tried again);
# 2 also for a missing setting; 130 Ctrl-C here, training goes on; 143 ended by `stop`.
set -euo pipefail

# --- Settings -----------------------------------------------------------------------------------

NAME=${NAME:-mlp-models}                  # of the queued resource and its node
PROJECT=${PROJECT:-}                      # Google Cloud project
ZONE=${ZONE:-}                            # for example us-east5-b
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-}    # for example v5litepod-16, v5p-32 or v6e-16
RUNTIME_VERSION=${RUNTIME_VERSION:-}      # default: chosen by ACCELERATOR_TYPE
SPOT=${SPOT:-1}                           # 1: cheaper, may be preempted; 0: on demand
CREATE_FLAGS=${CREATE_FLAGS:-}            # more flags for `queued-resources create`
BUCKET=${BUCKET:-}                        # name of a bucket, for WORKDIR
WORKDIR=${WORKDIR:-${BUCKET:+gs://$BUCKET/$NAME}} # a bucket: a worker's disk goes with the worker
REPO=${REPO:-$(dirname "${BASH_SOURCE[0]}")/..}   # a git checkout
REF=${REF:-HEAD}                          # the commit to train, without uncommitted changes
EXTRAS=${EXTRAS:-tpu,gcs}                 # of pyproject.toml, separated by commas
TRAIN_ENV=${TRAIN_ENV:-}                  # for training: NAME=VALUE, separated by spaces
LOG_WORKER=${LOG_WORKER:-0}               # a number, or all

POLL_SECONDS=${POLL_SECONDS:-30}          # between two polls
SSH_TRIES=${SSH_TRIES:-10}                # failed in a row, before a worker counts as lost
SETUP_TRIES=${SETUP_TRIES:-3}             # more than one: a package server may be busy
MAX_REQUESTS=${MAX_REQUESTS:-5}           # refused in a row, before `run` and `create` give up
MAX_CRASHES=${MAX_CRASHES:-3}             # restarts in a row; failures and preemptions don't count
CRASH_SECONDS=${CRASH_SECONDS:-3600}      # training that lasted this long resets MAX_CRASHES' count
STRAGGLER_POLLS=${STRAGGLER_POLLS:-6}     # how long workers may outlive the first that has failed

# shellcheck source-path=SCRIPTDIR source=tpu_slice.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_slice.sh"

# --- Training -----------------------------------------------------------------------------------

# Sets OUTCOME from the workers' status lines, and STATUS to the exit status of training.
#   running      all run                mixed         some run, others have ended badly
#   stopped      by `stop`              interrupted   saved on a signal, or never started
#   finished     all                    failed        by an error that would come again
#   crashed      anything else
judge() {
  local state stop running=0 interrupted=0 failed=0 crashed=0 asked=no
  OUTCOME="" STATUS=0
  while read -r _ _ _ state stop; do
    [[ $stop != stop ]] || asked=yes
    case $state in
    running) running=$((running + 1)) ;;
    0) ;;
    1 | 2 | 130) failed=$state ;;
    143 | 138 | lost | idle | new) interrupted=$((interrupted + 1)) ;;
    *) crashed=$state ;;
    esac
  done <<<"$WORKERS"
  if ((running)); then
    OUTCOME=running
    ((interrupted + failed + crashed == 0)) || OUTCOME=mixed
  elif [[ $asked == yes ]]; then
    OUTCOME=stopped STATUS=143
  elif ((interrupted)); then # before failed: a worker may fail because it lost another one
    OUTCOME=interrupted
  elif ((failed)); then
    OUTCOME=failed STATUS=$failed
  elif ((crashed)); then
    OUTCOME=crashed STATUS=$crashed
  else
    OUTCOME=finished
  fi
}

# Starts training with this commit on all workers, unless it is already running.
start() { # ARGUMENT ...
  ask || return
  judge
  if [[ $OUTCOME == running ]]; then
    say "training is running on $NAME: following it"
    return
  fi
  if ! is_set_up; then
    on_workers all "[ ! -e $WORKER_SCRIPT ] || bash $WORKER_SCRIPT end" || return
    set_up || return
  fi
  say "starting training on $NAME"
  # `end`: a worker that still runs waits for others that have ended.
  on_workers all "bash $WORKER_SCRIPT end && \
env ${TRAIN_ENV:+$TRAIN_ENV }bash $WORKER_SCRIPT start$(quoted --workdir "$WORKDIR" "$@")" || return
  DRY_WORKERS="WORKER worker $COMMIT 0 -"
}

# Waits until training has ended or workers are lost, and sets OUTCOME and STATUS.
follow() {
  local mixed=0
  while true; do
    ask || {
      OUTCOME=lost
      return
    }
    judge
    case $OUTCOME in
    running) mixed=0 ;;
    mixed)
      mixed=$((mixed + 1))
      if ((mixed >= STRAGGLER_POLLS)); then
        say "some workers have ended and the others wait for them: ending the others"
        WORKERS=$(grep -v ' running ' <<<"$WORKERS") # those that ended by themselves decide
        judge
        on_workers all "bash $WORKER_SCRIPT end" || OUTCOME=lost
        return
      fi
      ;;
    *) return ;;
    esac
    pause
  done
}

# --- Commands -----------------------------------------------------------------------------------

run() { # ARGUMENT ...
  local crashes=0 began
  trap 'say "training goes on; the same command follows it, stop ends it"; exit 130' INT
  while true; do
    make_active
    began=$SECONDS
    if start "$@"; then
      follow
    elif ask; then # the workers answer, but could not start training
      OUTCOME=crashed STATUS=1
    else
      OUTCOME=lost
    fi
    if [[ $OUTCOME == failed || $OUTCOME == crashed ]]; then
      query_state # a worker may fail because others were preempted
      [[ $STATE == ACTIVE || $STATE == UNKNOWN ]] || OUTCOME=lost
    fi
    case $OUTCOME in
    finished)
      say "training has finished; delete deletes $NAME"
      break
      ;;
    stopped)
      say "training has saved and stopped; the same command goes on from there"
      exit "$STATUS"
      ;;
    failed) die "$STATUS" "training failed with status $STATUS: launch/tpu_vm.sh logs says why" ;;
    crashed)
      ((SECONDS - began < CRASH_SECONDS)) || crashes=0
      crashes=$((crashes + 1))
      ((crashes <= MAX_CRASHES)) ||
        die 1 "training ended $crashes times with a status like $STATUS: see launch/tpu_vm.sh logs"
      say "training ended with status $STATUS: starting it again ($crashes of $MAX_CRASHES)"
      ;;
    interrupted) say "training was interrupted: it resumes" ;;
    lost)
      say "$NAME was preempted or lost: asking for it anew"
      [[ $STATE != ACTIVE ]] || delete || true
      ;;
    esac
  done
  if [[ $DRY_RUN == yes ]]; then
    echo "# after a preemption, before all of the above again:"
    delete
  fi
}

status() {
  query_state
  [[ $DRY_RUN == yes ]] || echo "$NAME $STATE"
  if [[ $DRY_RUN == yes || $STATE == ACTIVE ]]; then
    ask_once || die 1 "ssh does not reach the workers: $(tail -n 1 "$SCRATCH/ssh")"
    [[ $DRY_RUN == yes ]] || echo "$WORKERS"
  fi
}

setup() {
  ask_once || die 1 "ssh does not reach the workers: $(tail -n 1 "$SCRATCH/ssh")"
  judge
  [[ $OUTCOME != running && $OUTCOME != mixed ]] || die 1 "training is running: stop it first"
  set_up || die 1 "$NAME is $STATE"
}

# Names all missing settings at once.
need() { # NAME ...
  local name missing=""
  for name in "$@"; do
    [[ -n ${!name} ]] || missing+=" $name"
  done
  missing=${missing# }
  [[ -z $missing ]] || die 2 "set ${missing// /, }: see launch/tpu_vm.sh --help"
}

choose_runtime() {
  [[ -z $RUNTIME_VERSION ]] || return 0
  case $ACCELERATOR_TYPE in # https://cloud.google.com/tpu/docs/runtimes
  v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
  v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
  v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
  v2-* | v3-* | v4-*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
  esac
}

find_commit() {
  # As a hash: HEAD may have moved by the time a preempted slice is set up again.
  COMMIT=$(git -C "$REPO" rev-parse --verify --quiet "$REF^{commit}") ||
    die 2 "REPO=$REPO has no commit REF=$REF"
  git -C "$REPO" diff --quiet HEAD ||
    echo "note: uncommitted changes stay here; the workers get commit ${COMMIT:0:12}" >&2
}

check_training() { # ARGUMENT ...
  local argument config=no
  [[ $WORKDIR == gs://* ]] || die 2 "WORKDIR=$WORKDIR: it must be gs://BUCKET/FOLDER"
  for argument in "$@"; do
    case $argument in
    --config | --config=*) config=yes ;;
    --workdir | --workdir=*) die 2 "set WORKDIR, and leave --workdir out" ;;
    esac
  done
  [[ $config == yes ]] || die 2 "run needs --config, as in: run --config configs/mixer.py"
}

main() {
  local command="" arguments=() argument
  for argument in "$@"; do
    case $argument in
    --dry-run) DRY_RUN=yes ;;
    --help | -h)
      sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    *) if [[ -z $command ]]; then command=$argument; else arguments+=("$argument"); fi ;;
    esac
  done
  case $command in
  create | setup | run | status | logs | stop | delete) ;;
  "") die 2 "a command is missing: create, setup, run, status, logs, stop or delete" ;;
  *) die 2 "unknown command '$command': create, setup, run, status, logs, stop or delete" ;;
  esac
  [[ $command == run || ${#arguments[@]} == 0 ]] ||
    die 2 "$command takes no arguments: settings are variables of the environment"
  choose_runtime
  case $command in
  run) need PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION WORKDIR ;;
  create) need PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION ;;
  *) need PROJECT ZONE ;;
  esac
  [[ $command != run ]] || check_training ${arguments[@]+"${arguments[@]}"}
  [[ $DRY_RUN == yes ]] || command -v gcloud >/dev/null ||
    die 2 "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  find_commit
  if [[ $DRY_RUN == yes ]]; then
    SCRATCH=/tmp
  else
    SCRATCH=$(mktemp -d)
    trap 'rm -rf "$SCRATCH"' EXIT
  fi
  case $command in
  create) make_active ;;
  logs) on_workers "$LOG_WORKER" "tail -n 100 -F $WORKER_DIR/log" ;;
  stop) on_workers all "bash $WORKER_SCRIPT stop" ;;
  *) "$command" ${arguments[@]+"${arguments[@]}"} ;;
  esac
}

main "$@"
