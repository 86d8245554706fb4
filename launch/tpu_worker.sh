#!/usr/bin/env bash
# What launch/tpu_vm.sh does on each TPU worker. It is not meant to be called by hand.
#
#   tpu_worker.sh install COMMIT EXTRAS    makes the environment
#   tpu_worker.sh start ARGUMENT ...       starts training in a session of its own
#   tpu_worker.sh status                   prints one line: WORKER host commit state stop
#   tpu_worker.sh stop                     asks training to save and stop, and waits
#   tpu_worker.sh end                      the same, but kills training if it does not stop
#
# RUN/code holds the code, this file included. RUN also holds venv/, log and:
#   commit    the commit that is installed
#   pid       of the training process
#   lock      held while training lives
#   status    the exit status of training, once it has ended
#   stopping  `stop` was called: `run` must not start training again
set -euo pipefail

run=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$run/venv/bin/python}
stop_seconds=${STOP_SECONDS:-60} # training takes up to 30

# A lock, not a search for the pid: after a reboot the pid may be another process.
is_running() {
  [[ ! -e $run/status ]] && ! flock --shared --nonblock "$run/lock" true
}

wait_until_ended() { # SECONDS
  local tick
  for ((tick = 0; tick < $1 * 5; tick++)); do
    is_running || return 0
    sleep 0.2
  done
  ! is_running
}

# TPU images bring Python 3.10, which is too old; uv fetches a newer one as a ready build.
make_venv() {
  local candidate
  for candidate in python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -m venv "$run/venv"; then
      return
    fi
    rm -rf "$run/venv" # incomplete: Debian has ensurepip in a package of its own
  done
  python3 -m pip install --user --quiet uv
  python3 -m uv venv --seed --python 3.12 "$run/venv"
}

install() { # COMMIT EXTRAS
  local commit=$1 extras=$2
  rm -f "$run/commit" # if interrupted from here on, nothing counts as installed
  [[ -x $python ]] || make_venv
  (cd "$run/code" &&
    "$python" -m pip install --quiet --constraint constraints.txt --editable ".[$extras]")
  rm -f "$run/status" "$run/stopping" "$run/pid"
  printf '%s\n' "$commit" >"$run/commit"
}

start() {
  if is_running; then
    echo "training is running already" >&2
    return 1
  fi
  rm -f "$run/status" "$run/stopping" "$run/pid"
  # In a session of its own, so that it outlives the ssh connection.
  setsid nohup bash "${BASH_SOURCE[0]}" supervise "$@" >>"$run/log" 2>&1 </dev/null &
  local tick
  for ((tick = 0; tick < 200; tick++)); do
    [[ ! -e $run/pid ]] || return 0
    sleep 0.05
  done
  echo "training has not started: see $run/log" >&2
  return 1
}

# Runs training and writes down how it ended.
supervise() {
  local signalled
  trap 'signalled=yes' TERM # at shutdown every process is signalled; this one must write the status
  exec 9>"$run/lock"
  flock --timeout 5 9 # `is_running` may hold it for a moment
  cd "$run/code"
  "$python" -m train.main "$@" & # inherits the lock: held until both processes end
  local training=$! code
  printf '%s\n' "$training" >"$run/pid.new"
  mv "$run/pid.new" "$run/pid"
  while true; do
    signalled=no code=0
    wait "$training" || code=$?
    [[ $signalled == yes ]] || break # a signal ends `wait` early: training is still saving
  done
  printf '%s\n' "$code" >"$run/status.new"
  mv "$run/status.new" "$run/status"
}

status() {
  local state commit=- stop=-
  [[ ! -e $run/commit ]] || commit=$(<"$run/commit")
  [[ ! -e $run/stopping ]] || stop=stop
  if [[ -e $run/status ]]; then
    state=$(<"$run/status")
  elif is_running; then
    state=running
  elif [[ -e $run/pid ]]; then
    state=lost # the machine was restarted, or something killed training and its supervisor
  else
    state=idle
  fi
  printf 'WORKER %s %s %s %s\n' "$(hostname)" "$commit" "$state" "$stop"
}

ask_to_end() {
  kill -TERM "$(<"$run/pid")" 2>/dev/null || true # it may have ended by itself
}

stop() {
  if is_running; then
    touch "$run/stopping"
    ask_to_end
    wait_until_ended "$stop_seconds" || true
  fi
  status
}

end() {
  is_running || return 0
  ask_to_end
  wait_until_ended "$stop_seconds" && return
  kill -KILL "$(<"$run/pid")" 2>/dev/null || true # it may be waiting for a lost worker
  wait_until_ended "$stop_seconds"
}

"$@"
