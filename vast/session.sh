#!/usr/bin/env bash
# Runs on the remote machine: a program there that outlives the connection it was started over, one for each NAME.
#
#   session.sh FOLDER NAME start TOKEN COMMAND...   starts it in FOLDER, unless one runs or TOKEN was started before
#   session.sh FOLDER NAME follow TOKEN OFFSET      its log from that byte on, until it has ended
#   session.sh FOLDER NAME stop                     ends it: TERM, ten seconds later KILL
#
# Sent to the machine as the input of `bash -s` by run_training_on_vast.sh and connect_vast.sh; whoever starts chooses
# TOKEN, so that a start whose answer was lost can be repeated. Answers are lines that begin with `perpcast-`: to
# `start` the token and the command of what runs, to `follow` (on the error output) the exit code, 137 where there is
# none. FOLDER/.perpcast/NAME/ holds token, command, pid, log and exit_code.
set -eu

# exit_code is as long from the start as it will be: it is overwritten in place, which works on a full disk too.
# shellcheck disable=SC2016 # expanded there, by the shell that waits for the command
RUN='name=$1 && shift 2 && trap : TERM INT && code=0; "$@" || code=$?; printf "%-3s" "$code" 1<>".perpcast/$name/exit_code"'

main() {
  cd "$1"
  name=$2 action=$3
  shift 3
  mkdir -p ".perpcast/$name"
  case $action in
  start) start "$@" ;;
  follow) follow "$@" ;;
  stop) stop ;;
  esac
}

note() { cat ".perpcast/$name/$1" 2>/dev/null || true; }

# Whether the process of that number is ours still: numbers come again, the token in its arguments does not.
alive() {
  local pid token
  pid=$(note pid) token=$(note token)
  [ -n "$pid" ] && [ -n "$token" ] || return 1
  if [ -d /proc/self ]; then tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline"; else ps -ww -o command= -p "$pid"; fi 2>/dev/null |
    grep -F -- " $token " >/dev/null
}

start() {
  local token=$1 state=started
  shift
  lock
  if alive; then
    state=running
  elif [ "$(note token)" != "$token" ]; then
    printf '   ' >".perpcast/$name/exit_code"
    : >".perpcast/$name/log"
    rm -f ".perpcast/$name/pid"
    printf '%s\n' "$*" >".perpcast/$name/command"
    printf '%s\n' "$token" >".perpcast/$name/token"
    unset SSH_CLIENT SSH_CONNECTION SSH_TTY # it outlives them; bash would greet whom they name, into the log
    set -m # a process group of its own, which `stop` ends as a whole
    PYTHONUNBUFFERED=1 nohup bash -c "$RUN" perpcast-session "$name" "$token" "$@" \
      </dev/null >>".perpcast/$name/log" 2>&1 &
    printf '%s\n' "$!" >".perpcast/$name/pid"
    set +m
  fi
  unlock
  printf '\nperpcast-session: %s %s %s\n' "$(note token)" "$state" "$(note command)"
}

# Held for a moment only: one that is ten seconds old was left by a machine that went down.
lock() {
  local tries=0
  until mkdir ".perpcast/$name/lock" 2>/dev/null; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || break
    sleep 0.1
  done
}

unlock() { rmdir ".perpcast/$name/lock" 2>/dev/null || true; }

follow() {
  local token=$1 offset=$2 rounds=0 code size
  printf '\nperpcast-log\n'
  while :; do
    code=$(outcome "$token") # before the log: what ends in between is sent with the next round
    size=$(($(wc -c <".perpcast/$name/log")))
    if [ "$size" -gt "$offset" ]; then
      tail -c "+$((offset + 1))" ".perpcast/$name/log" | head -c "$((size - offset))"
      offset=$size
    fi
    [ -z "$code" ] || break
    rounds=$((rounds + 1))
    [ $((rounds % 20)) -ne 0 ] || echo perpcast-alive >&2 # ends this loop where nobody listens any more
    sleep 0.5
  done
  printf 'perpcast-free-kb: %s\n' "$(df -Pk . | awk 'END { print $4 }')" >&2
  printf 'perpcast-exit: %s\n' "$code" >&2
}

# The session's exit code, nothing while it runs.
outcome() {
  if [ "$(note token)" != "$1" ]; then
    echo "another session has taken its place" >&2
    exit 1
  fi
  ! alive || return 0
  local code
  code=$(note exit_code | tr -d ' ')
  echo "${code:-137}"
}

stop() {
  local pid tries=0
  pid=$(note pid)
  if ! alive; then
    printf '\nperpcast-stopped: nothing\n'
    return
  fi
  kill -TERM -- "-$pid" 2>/dev/null || true
  while alive && [ "$tries" -lt 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
  printf '\nperpcast-stopped: %s\n' "$(note command)"
}

main "$@"
