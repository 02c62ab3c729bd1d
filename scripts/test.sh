#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; all arguments go to pytest.
# Folders made, all in the repository: .venv, .cache (ComfyUI, small models, logs) and the tools' own caches.
# Outside it, only pip's download cache and the system's temporary folder are used.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/scripts/_python.sh"
environment=$("$python" "$root/scripts/environment.py" --tests)
cd "$root"
exec "$environment" -m pytest "$@"
