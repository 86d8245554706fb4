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

NAME=${NAME:-mlp-models}                  # of the queued resource and of its node
PROJECT=${PROJECT:-}                      # Google Cloud project
ZONE=${ZONE:-}                            # as in us-east5-b
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-}    # as in v5litepod-16, v5p-32 or v6e-16
RUNTIME_VERSION=${RUNTIME_VERSION:-}      # chosen by the accelerator where it is not set
SPOT=${SPOT:-1}                           # 1: cheaper, may be preempted; 0: on demand
CREATE_FLAGS=${CREATE_FLAGS:-}            # more for `queued-resources create`, as in --network=mine
BUCKET=${BUCKET:-}                        # name of a bucket, for WORKDIR
WORKDIR=${WORKDIR:-${BUCKET:+gs://$BUCKET/$NAME}} # gs://...: the workers' disks are lost with them
REPO=${REPO:-$(dirname "${BASH_SOURCE[0]}")/..}   # a git checkout
REF=${REF:-HEAD}                          # what of it is trained; uncommitted changes are not
EXTRAS=${EXTRAS:-tpu,gcs}                 # of pyproject.toml, separated by commas
TRAIN_ENV=${TRAIN_ENV:-}                  # for training: NAME=VALUE, separated by spaces
LOG_WORKER=${LOG_WORKER:-0}               # a number, or all

POLL_SECONDS=${POLL_SECONDS:-30}          # between two questions
SSH_TRIES=${SSH_TRIES:-10}                # unanswered in a row, after which a worker is lost
SETUP_TRIES=${SETUP_TRIES:-3}             # a package server may be busy
MAX_REQUESTS=${MAX_REQUESTS:-5}           # refused in a row, after which `run` and `create` give up
MAX_CRASHES=${MAX_CRASHES:-3}             # ends that are neither failure nor preemption, in a row
CRASH_SECONDS=${CRASH_SECONDS:-3600}      # of training, after which an end begins a new row
STRAGGLER_POLLS=${STRAGGLER_POLLS:-6}     # how long workers may outlive the first that has failed

# --- Saying and running -------------------------------------------------------------------------

DRY_RUN=no
WORKER_DIR=mlp_models_run # in the home folder of each worker; see tpu_worker.sh
WORKER_SCRIPT=$WORKER_DIR/code/launch/tpu_worker.sh

say() {
  if [[ $DRY_RUN == yes ]]; then echo "# $*"; else echo "$(date +%H:%M:%S) $*"; fi
}

die() { # STATUS MESSAGE
  echo "error: $2" >&2
  exit "$1"
}

run_command() {
  if [[ $DRY_RUN == yes ]]; then
    local word line="" apostrophe="'\\''"
    for word in "$@"; do
      [[ $word =~ ^[A-Za-z0-9_./:=,@-]+$ ]] || word="'${word//\'/$apostrophe}'"
      line+=" $word"
    done
    echo "${line# }"
  else
    "$@" </dev/null # ssh would read it
  fi
}

tpus() {
  run_command gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

# A worker that vanishes sends no goodbye: without these, ssh would wait for ever.
on_workers() { # WORKER COMMAND
  tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2" \
    --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=15
}

quoted() { # for the workers' shell
  printf ' %q' "$@"
}

pause() {
  [[ $DRY_RUN == yes ]] || sleep "$POLL_SECONDS"
}

# --- The queued resource ------------------------------------------------------------------------

STATE="" # of the queued resource: NONE where there is none, UNKNOWN where gcloud cannot tell
KNOWN=no # whether gcloud has ever told
REACHED=no # whether the workers have ever answered
DRY_STATE=NONE

query_state() {
  local answer before=$STATE
  if [[ $DRY_RUN == yes ]]; then
    tpus queued-resources describe "$NAME" --format='value(state.state)'
    STATE=$DRY_STATE
    return
  fi
  if answer=$(tpus queued-resources describe "$NAME" --format='value(state.state)' \
    2>"$SCRATCH/describe"); then
    STATE=${answer:-UNKNOWN}
  elif grep -q NOT_FOUND "$SCRATCH/describe"; then
    STATE=NONE
  else
    STATE=UNKNOWN
  fi
  if [[ $STATE != "$before" ]]; then
    say "$NAME is $STATE"
    [[ $STATE != UNKNOWN ]] || cat "$SCRATCH/describe" >&2
  fi
  [[ $STATE == UNKNOWN ]] || KNOWN=yes
}

create() {
  local flags=()
  [[ $SPOT == 0 ]] || flags+=(--spot)
  # shellcheck disable=SC2206 # it is a list of flags
  flags+=($CREATE_FLAGS)
  REACHED=no WORKER_COUNT=0
  tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" ${flags[@]+"${flags[@]}"} || return
  DRY_STATE=ACTIVE
}

delete() {
  # --force: with its node, which may still be there.
  tpus queued-resources delete "$NAME" --force
  DRY_STATE=NONE
}

# Deletes what is dead, asks for it anew and waits.
make_active() {
  local refused=0
  while true; do
    query_state
    case $STATE in
    ACTIVE) return ;;
    NONE) create || refused=$((refused + 1)) ;;
    FAILED) # the request itself: no quota, or a flag that the service does not like
      refused=$((refused + 1))
      ((refused >= MAX_REQUESTS)) || delete || true
      ;;
    SUSPENDED) delete || true ;; # preempted
    UNKNOWN) [[ $KNOWN == yes ]] || refused=$((refused + 1)) ;;
    *) ;; # it waits in the queue, or is being made or taken away
    esac
    ((refused < MAX_REQUESTS)) || die 1 "no $NAME after $refused tries: see what gcloud said, \
or: gcloud compute tpus queued-resources describe $NAME --project=$PROJECT --zone=$ZONE"
    pause
  done
}

# --- The workers --------------------------------------------------------------------------------

WORKERS="" # what those that answered last said of themselves, a line each; see tpu_worker.sh
WORKER_COUNT=0
DRY_WORKERS="WORKER worker - new -"

ask_once() {
  local answer lines status=0
  # A worker without our code has nothing to say for itself.
  local question="if [ -e $WORKER_SCRIPT ]; then bash $WORKER_SCRIPT status; \
else echo WORKER \$(hostname) - new -; fi"
  if [[ $DRY_RUN == yes ]]; then
    on_workers all "$question"
    WORKERS=$DRY_WORKERS
    return
  fi
  answer=$(on_workers all "$question" 2>"$SCRATCH/ssh") || status=$?
  WORKERS=$(grep '^WORKER ' <<<"$answer") || return
  lines=$(wc -l <<<"$WORKERS")
  ((status == 0 && lines >= WORKER_COUNT)) || return # one of them has not answered
  WORKER_COUNT=$lines
}

# Fails where some of the workers are lost. This machine's own network may be down meanwhile, and
# training go on.
ask() {
  local unanswered=0
  until ask_once; do
    unanswered=$((unanswered + 1))
    query_state
    case $STATE in
    UNKNOWN) unanswered=0 ;;
    ACTIVE)
      if ((unanswered >= SSH_TRIES)); then
        [[ $REACHED == yes && -n $WORKERS ]] && return 1
        # Anew would not help, and cost: it is a key, a firewall, or the network here.
        cat "$SCRATCH/ssh" >&2
        [[ $REACHED == no ]] || die 1 "ssh reaches none of $NAME any more, which is ACTIVE: \
training may go on, and the same command follows it again; if it is dead, delete it first"
        die 1 "ssh does not reach the workers of $NAME"
      fi
      ;;
    *) return 1 ;;
    esac
    pause
  done
  REACHED=yes
}

set_up() {
  local archive=$SCRATCH/mlp_models.tar install try
  install="rm -rf $WORKER_DIR/code && mkdir -p $WORKER_DIR/code && \
tar -xf mlp_models.tar -C $WORKER_DIR/code && \
bash $WORKER_SCRIPT install $COMMIT$(quoted "$EXTRAS")"
  run_command git -C "$REPO" archive --output="$archive" "$COMMIT"
  for ((try = 1; try <= SETUP_TRIES; try++)); do
    say "setting up $NAME with commit ${COMMIT:0:12}"
    if tpus tpu-vm scp "$archive" "$NAME:mlp_models.tar" --worker=all \
      --scp-flag=-oConnectTimeout=20 --scp-flag=-oServerAliveInterval=15 &&
      on_workers all "$install"; then
      return
    fi
    query_state
    [[ $STATE == ACTIVE ]] || return 1
    pause
  done
  die 1 "the set-up failed $SETUP_TRIES times: see above"
}

# Sets OUTCOME to what the workers' lines come to, and STATUS to the exit status of the training.
#   running      all run          mixed         some run, and others have ended badly
#   stopped      by `stop`        interrupted   saved on a signal, or never started: start (again)
#   finished     all              failed        by an error that would only come again
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
  elif ((interrupted)); then # before failed: who loses a neighbour may fail for it
    OUTCOME=interrupted
  elif ((failed)); then
    OUTCOME=failed STATUS=$failed
  elif ((crashed)); then
    OUTCOME=crashed STATUS=$crashed
  else
    OUTCOME=finished
  fi
}

is_set_up() {
  local commit
  while read -r _ _ commit _; do
    [[ $commit == "$COMMIT" ]] || return 1
  done <<<"$WORKERS"
}

# Training on all workers, with this commit: where it runs already, it is left alone.
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
  # One that still runs waits for workers that have ended.
  on_workers all "bash $WORKER_SCRIPT end && \
env ${TRAIN_ENV:+$TRAIN_ENV }bash $WORKER_SCRIPT start$(quoted --workdir "$WORKDIR" "$@")" || return
  DRY_WORKERS="WORKER worker $COMMIT 0 -"
}

# Until training has ended, or the workers are lost.
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
        say "some workers have ended, others wait for them: ending those"
        WORKERS=$(grep -v ' running ' <<<"$WORKERS") # what ended them is not what we judge by
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
    elif ask; then # they are there, and could not start it
      OUTCOME=crashed STATUS=1
    else
      OUTCOME=lost
    fi
    if [[ $OUTCOME == failed || $OUTCOME == crashed ]]; then
      query_state # a worker may fail because others were taken away
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

# The setting's names are in the message, so that one line tells all.
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
  # By its hash: HEAD may have moved on when a preempted slice is set up anew.
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
