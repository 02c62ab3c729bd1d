#!/usr/bin/env bash
# Wan from GGUF to MP4 in the real ComfyUI; `scripts/demo.sh --help` says what it does and which folders it makes.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/scripts/_python.sh"
exec "$python" "$root/scripts/demo.py" "$@"
