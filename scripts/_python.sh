# Sourced by the other scripts with $root set: sets $python to an interpreter of version 3.10 or later.
python=
for candidate in "${PYTHON:-}" "$root/.venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10 python; do
    if [ -n "$candidate" ] &&
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 </dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "No Python 3.10 or later was found: install one, or name it in the variable PYTHON." >&2
    exit 1
fi
