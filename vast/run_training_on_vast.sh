#!/usr/bin/env bash
# Trains on a machine reached over SSH, in a session that survives a lost connection, and shows its log.
#
#   vast/run_training_on_vast.sh [-F SSH_CONFIG] [-p PORT] [-d FOLDER] [--lost-minutes N] [--stop] [HOST] [-- COMMAND...]
#
#   --lost-minutes N  without a connection for so long, give up with exit code 75 (default 10; 0.5 is half a minute)
#   --stop            end the session there: TERM, ten seconds later KILL
#
# COMMAND runs in FOLDER there; without one, the regression on the newest dataset there. Where a session runs already it
# is attached to and nothing is started. The log comes whole, each line once, however often the connection is lost. Ends
# with the command's own exit code (137: killed). Ctrl-C leaves the session running. A training goes on from its last
# checkpoint by itself. HOST is user@host or user@host:port; without it the rented machine, or `vast.host` of config.yaml.
#
# Examples:
#   vast/run_training_on_vast.sh
#   vast/run_training_on_vast.sh --lost-minutes 30 me@gpu.example.org
#   vast/run_training_on_vast.sh gpu -- .venv/bin/python -m vast.remote --task classification --dataset 0f3a5c
#   vast/run_training_on_vast.sh --stop gpu
set -euo pipefail
SUBJECT=session
# shellcheck source=vast/target.sh
source "$(dirname "${BASH_SOURCE[0]}")/target.sh"

lost_minutes=10 stop=no command=()
while [ $# -gt 0 ]; do
  TOOK=2
  case $1 in
  --)
    shift
    command=("$@")
    [ ${#command[@]} -gt 0 ] || wrong_use "no COMMAND behind --"
    break
    ;;
  --lost-minutes) lost_minutes=$(value "$@") ;;
  --stop) stop=yes TOOK=1 ;;
  *) target_option "$@" ;;
  esac
  shift "$TOOK"
done
[ ${#WORDS[@]} -le 1 ] || wrong_use "one HOST at most"
[[ $lost_minutes =~ ^[0-9]*\.?[0-9]+$ ]] || wrong_use "--lost-minutes needs a number, not '$lost_minutes'"
lost_seconds=$(awk "BEGIN { printf \"%d\", 60 * $lost_minutes }")
if [ ${#command[@]} -eq 0 ]; then
  # shellcheck disable=SC2016 # expanded there
  command=(bash -c 'newest=$(ls -td datasets/*/ | head -n 1) && [ -n "$newest" ] || exit 2
exec .venv/bin/python -m vast.remote --task regression --dataset "$(basename "$newest")"')
fi
find_target "${WORDS[0]-}"

open_work
token=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
: >"$WORK/log"
mkfifo "$WORK/stream"
lost_at=$SECONDS was_connected=no

# on_remote ACTION...: session.sh there; 255 where there was no connection, or none any more.
on_remote() {
  local code=0
  attend "${SSH[@]}" "$HOST" "bash -s -- $FOLDER session $(printf '%q ' "$@")" \
    <"$ROOT/vast/session.sh" 2>"$WORK/error" || code=$?
  return "$code"
}

# After a connection that failed or was lost: waits, or ends where there is no hope or no time left.
wait_for_connection() {
  local said left
  said=$(cat "$WORK/error")
  ! has_wrong_host_key "$said" || refuse_connection "$said"
  [ "$was_connected" = yes ] || [[ $said != *"Permission denied"* ]] || refuse_connection "$said"
  left=$((lost_seconds - (SECONDS - lost_at)))
  [ "$left" -gt 0 ] || fail 75 "no connection to $HOST for $lost_minutes minutes: given up; the session may still run there"
  [ "$PAUSE" -le "$left" ] || PAUSE=$left
  say "no connection to $HOST ($(last_word "$said")), again in $PAUSE s; given up in $left s"
  pause
}

connected() { was_connected=yes lost_at=$SECONDS PAUSE=1; }

# until_answered ACTION...: session.sh there, again until there was a connection; ANSWER is what it printed.
until_answered() {
  local code
  while :; do
    code=0
    on_remote "$@" >"$WORK/answer" || code=$?
    [ "$code" != 255 ] || { wait_for_connection && continue; }
    connected
    [ "$code" = 0 ] || fail 1 "it could not $1 on $HOST: $(last_word "$(cat "$WORK/error")")"
    ANSWER=$(sed -n 's/^perpcast-[a-z]*: //p' "$WORK/answer")
    return
  done
}

# What comes before the mark is a greeting of the machine, and none of the log. `read` takes no byte beyond the line.
show_log() {
  local line
  while IFS= read -r line; do
    if [ "$line" = perpcast-log ]; then
      : >"$WORK/open"
      exec tee -a "$WORK/log"
    fi
  done
}

# One connection: the log from where the last one left it.
follow() {
  local code=0 reader
  rm -f "$WORK/open"
  # Held open here, or whoever opens one end waits for the other one, deaf to signals.
  exec 4<>"$WORK/stream"
  show_log <"$WORK/stream" 4>&- &
  reader=$!
  on_remote follow "$token" "$(($(wc -c <"$WORK/log")))" >"$WORK/stream" 4>&- || code=$?
  exec 4>&-
  wait "$reader" || true
  [ ! -e "$WORK/open" ] || connected
  return "$code"
}

if [ "$stop" = yes ]; then
  until_answered stop
  if [ "$ANSWER" = nothing ]; then say "nothing runs on $HOST"; else say "ended on $HOST: $ANSWER"; fi
  exit 0
fi

# shellcheck disable=SC2317,SC2329 # the traps call it
leave() {
  say "the session on $HOST runs on: the same command attaches again, with --stop it is ended"
  exit "$1"
}
trap 'leave 130' INT
trap 'leave 143' TERM
until_answered start "$token" "${command[@]}"
read -r running _ what <<<"$ANSWER"
[ "$running" = "$token" ] || say "one runs on $HOST already, attached to it: $what"
token=$running
while :; do
  code=0
  follow || code=$?
  exit_code=$(sed -n 's/^perpcast-exit: //p' "$WORK/error")
  [ -z "$exit_code" ] || break
  [ "$code" = 255 ] || fail 1 "the log cannot be followed: $(last_word "$(cat "$WORK/error")")"
  wait_for_connection
done
free=$(sed -n 's/^perpcast-free-kb: //p' "$WORK/error")
if [ "$exit_code" != 0 ]; then
  say "it ended with exit code $exit_code"
  [ "${free:-1000000}" -ge 10240 ] || say "the disk of $HOST is full ($free kB left)"
fi
exit "$exit_code"
