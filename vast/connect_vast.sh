#!/usr/bin/env bash
# Opens a shell on a machine reached over SSH, and its TensorBoard on http://localhost:6006.
#
#   vast/connect_vast.sh [-F SSH_CONFIG] [-p PORT] [-d FOLDER] [--tensorboard-only] [--local-port 6006] [HOST]
#
#   --tensorboard-only  no shell, until Ctrl-C
#   --local-port PORT   http://localhost:PORT instead
#
# TensorBoard is started there once, over FOLDER/logs, on a free port that only the machine itself can reach, and runs on
# until the machine ends. HOST is user@host or user@host:port; without it the rented machine, or `vast.host` of
# config.yaml.
#
# Examples:
#   vast/connect_vast.sh
#   vast/connect_vast.sh --tensorboard-only --local-port 16006
#   vast/connect_vast.sh -d '~/perpcast' me@gpu.example.org
set -euo pipefail
SUBJECT=connect
# shellcheck source=vast/target.sh
source "$(dirname "${BASH_SOURCE[0]}")/target.sh"

local_port=6006 shell=yes
while [ $# -gt 0 ]; do
  TOOK=2
  case $1 in
  --local-port) local_port=$(port "$@") ;;
  --tensorboard-only) shell=no TOOK=1 ;;
  *) target_option "$@" ;;
  esac
  shift "$TOOK"
done
[ ${#WORDS[@]} -le 1 ] || wrong_use "one HOST at most"
find_target "${WORDS[0]-}"
! (exec 3<>"/dev/tcp/127.0.0.1/$local_port") 2>/dev/null ||
  fail 1 "port $local_port of this computer is taken: name another one by --local-port"

open_work

# Starts it, or finds the one that runs; it says its port in its log, or why there is none.
start_tensorboard() {
  local token code=0
  token=$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')
  attend "${SSH[@]}" "$HOST" "bash -s -- $FOLDER tensorboard start $token" \
    ".venv/bin/python -m tensorboard.main --logdir logs --host 127.0.0.1 --port 0" \
    <"$ROOT/vast/session.sh" >"$WORK/answer" 2>"$WORK/error" || code=$?
  [ "$code" != 255 ] || refuse_connection "$(cat "$WORK/error")"
  [ "$code" = 0 ] || fail 1 "TensorBoard cannot be started on $HOST: $(last_word "$(cat "$WORK/error")")"
  there "cd $FOLDER/.perpcast/tensorboard && for i in \$(seq 120); do
      if grep -q 'at http://127' log || [ -n \"\$(tr -d ' ' <exit_code)\" ]; then break; fi
      sleep 0.5
    done; cat log" || true
  remote_port=$(sed -n 's|.* at http://127\.0\.0\.1:\([0-9]*\)/.*|\1|p' "$WORK/answer" | head -n 1)
  [ -n "$remote_port" ] || fail 1 "TensorBoard did not start on $HOST: $(last_word "$(cat "$WORK/answer")")"
}

remote_port=''
start_tensorboard
forward=(-o ExitOnForwardFailure=yes -L "127.0.0.1:$local_port:127.0.0.1:$remote_port")
say "TensorBoard: http://localhost:$local_port"
if [ "$shell" = yes ]; then
  code=0
  [ ! -t 0 ] || forward+=(-t)
  # shellcheck disable=SC2016 # SHELL is the one there
  "${INTERACTIVE[@]}" "${forward[@]}" "$HOST" "cd $FOLDER && "'exec "${SHELL:-bash}" -l' || code=$?
  exit "$code"
fi
say "until Ctrl-C"
attend "${SSH[@]}" "${forward[@]}" -N "$HOST" 2>"$WORK/error" || refuse_connection "$(cat "$WORK/error")"
