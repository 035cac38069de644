#!/usr/bin/env bash
# Lets a machine reached over SSH use the PostgreSQL of this computer: a reverse tunnel that keeps itself alive.
#
#   vast/setup_remote_db_tunnel.sh [-F SSH_CONFIG] [-p PORT] [-r REMOTE_PORT] [-l LOCAL_PORT] [HOST]
#
# Runs until Ctrl-C. There 127.0.0.1:REMOTE_PORT is then 127.0.0.1:LOCAL_PORT of this computer (both 5555 unless
# told). Prints `tunnel: open` whenever it really is; after a lost connection it connects again by itself. HOST is
# user@host or user@host:port; without it the rented machine, or `vast.host` of config.yaml.
#
# Examples:
#   vast/setup_remote_db_tunnel.sh
#   vast/setup_remote_db_tunnel.sh -p 2222 me@gpu.example.org
#   vast/setup_remote_db_tunnel.sh -r 15555 gpu
set -euo pipefail
SUBJECT=tunnel
# shellcheck source=vast/target.sh
source "$(dirname "${BASH_SOURCE[0]}")/target.sh"

remote_port=5555 local_port=5555
while [ $# -gt 0 ]; do
  case $1 in
  -r)
    remote_port=$(port "$@")
    shift 2
    ;;
  -l)
    local_port=$(port "$@")
    shift 2
    ;;
  *)
    target_option "$@"
    shift "$TOOK"
    ;;
  esac
done
[ ${#WORDS[@]} -le 1 ] || wrong_use "one HOST at most"
find_target "${WORDS[0]-}"
(exec 3<>"/dev/tcp/127.0.0.1/$local_port") 2>/dev/null ||
  fail 1 "nothing listens on 127.0.0.1:$local_port here: start PostgreSQL (python init_database.py), or name its port by -l"

open_work
MARK=perpcast-tunnel-is-open
mkfifo "$WORK/hold" "$WORK/said"
# The session there ends with its input, and this script alone holds the other end of it: so it ends however we end.
exec 8<>"$WORK/hold"

announce() {
  local line
  while IFS= read -r line; do
    [ "$line" = "$MARK" ] || continue
    : >"$WORK/open"
    printf 'tunnel: open\n'
  done
}

# One connection, from its start to its end. SSH asks for the forward before it asks for the command, and ends where
# the forward is refused: the mark comes through an open tunnel only.
connect() {
  rm -f "$WORK/open"
  announce <"$WORK/said" 8>&- &
  local reader=$!
  "${SSH[@]}" -o ExitOnForwardFailure=yes -R "127.0.0.1:$remote_port:127.0.0.1:$local_port" "$HOST" \
    "echo $MARK; exec cat >/dev/null" <"$WORK/hold" >"$WORK/said" 2>"$WORK/error" 8>&- &
  CHILD=$!
  wait "$CHILD" || true
  CHILD=
  wait "$reader" || true
}

was_open=no
while :; do
  connect
  error=$(cat "$WORK/error")
  if [ -e "$WORK/open" ]; then
    was_open=yes PAUSE=1
  fi
  if has_wrong_host_key "$error"; then
    refuse_connection "$error"
  elif [ ! -e "$WORK/open" ] && [[ $error == *"remote port forwarding failed"* ]]; then
    say "port $remote_port there is still held by another session (or forwarding is forbidden), again in $PAUSE s"
  elif [ "$was_open" = no ]; then
    refuse_connection "$error"
  else
    printf 'tunnel: lost, again in %s s\n' "$PAUSE"
    [ -z "$error" ] || say "$(last_word "$error")"
  fi
  pause
done
