#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them, one worker per core, at most four;
# all arguments go to pytest (-n 0: no workers).
# Folders made, all in the repository: .venv, .cache (ComfyUI, small models, logs) and the tools' own caches.
# Outside it, only pip's download cache and the system's temporary folder are used; on Debian and its relatives root
# also gets ffmpeg and chromium from apt-get where they are missing.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/scripts/_python.sh"
environment=$("$python" "$root/scripts/environment.py" --tests)
cd "$root"
workers=$(getconf _NPROCESSORS_ONLN)
[ "$workers" -le 4 ] || workers=4
exec "$environment" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
