# shellcheck shell=bash
# A TPU slice: its queued resource, and its workers over ssh.
#
# Sourced by tpu_vm.sh, which sets the settings, COMMIT and SCRATCH (a folder for temporary files).

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

# The two timeouts: when a worker vanishes, ssh gets no reply and would wait for ever.
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

STATE="" # of the queued resource; NONE: it does not exist; UNKNOWN: gcloud failed
KNOWN=no # yes: gcloud has answered at least once
REACHED=no # yes: all workers have answered at least once
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
  # --force also deletes the node, which may still exist.
  tpus queued-resources delete "$NAME" --force
  DRY_STATE=NONE
}

# Waits until the slice is active; deletes a dead one and requests it again.
make_active() {
  local refused=0
  while true; do
    query_state
    case $STATE in
    ACTIVE) return ;;
    NONE) create || refused=$((refused + 1)) ;;
    FAILED) # the request itself failed: no quota, or a flag that the service rejects
      refused=$((refused + 1))
      ((refused >= MAX_REQUESTS)) || delete || true
      ;;
    SUSPENDED) delete || true ;; # preempted
    UNKNOWN) [[ $KNOWN == yes ]] || refused=$((refused + 1)) ;;
    *) ;; # queued, or being created or deleted
    esac
    ((refused < MAX_REQUESTS)) || die 1 "no $NAME after $refused tries: see what gcloud said, \
or: gcloud compute tpus queued-resources describe $NAME --project=$PROJECT --zone=$ZONE"
    pause
  done
}

# --- The workers --------------------------------------------------------------------------------

WORKERS="" # the latest status lines, one per worker that answered; see tpu_worker.sh
WORKER_COUNT=0
DRY_WORKERS="WORKER worker - new -"

ask_once() {
  local answer lines status=0
  # A new worker does not have our script yet.
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
  ((status == 0 && lines >= WORKER_COUNT)) || return # a worker has not answered
  WORKER_COUNT=$lines
}

# Asks until all workers answer; fails if some are lost. While gcloud does not answer either, the
# fault may be this machine's network: that does not count, because training may go on.
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
        # A new slice would cost money and not help: a key, a firewall or the network is at fault.
        cat "$SCRATCH/ssh" >&2
        [[ $REACHED == no ]] || die 1 "ssh no longer reaches $NAME, which is ACTIVE: \
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

is_set_up() {
  local installed
  while read -r _ _ installed _; do
    [[ $installed == "$COMMIT" ]] || return 1
  done <<<"$WORKERS"
}
