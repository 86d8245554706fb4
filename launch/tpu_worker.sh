#!/usr/bin/env bash
# What launch/tpu_vm.sh does on each TPU worker. It is not meant to be called by hand.
#
#   tpu_worker.sh install COMMIT EXTRAS                makes the environment
#   tpu_worker.sh start ARGUMENT ...                   starts training, apart from this session
#   tpu_worker.sh status                               one line: WORKER host commit state stop
#   tpu_worker.sh stop                                 asks training to save and stop; waits
#   tpu_worker.sh end                                  the same, and kills what does not stop
#
# The code lies in RUN/code, with this file in it; RUN also holds venv/, the log, and:
#   commit  what is installed        pid     of the training process
#   lock    held while it lives      status  its exit status, once it has ended
#   stopping  `stop` was called: not to be started again
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
    rm -rf "$run/venv" # half made, where Debian has left out what venv needs
  done
  python3 -m pip install --user --quiet uv
  python3 -m uv venv --seed --python 3.12 "$run/venv"
}

install() { # COMMIT EXTRAS
  local commit=$1 extras=$2
  rm -f "$run/commit" # whoever is interrupted here has nothing installed
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
  # A session of its own: it must outlive the ssh connection, and the laptop at its other end.
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
  trap 'signalled=yes' TERM # a machine that shuts down signals all; this one has a status to write
  exec 9>"$run/lock"
  flock --timeout 5 9 # `is_running` has it for a moment
  cd "$run/code"
  "$python" -m train.main "$@" & # has the lock too: it is held as long as either lives
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
  kill -KILL "$(<"$run/pid")" 2>/dev/null || true # waits for a worker that is no longer there
  wait_until_ended "$stop_seconds"
}

"$@"
