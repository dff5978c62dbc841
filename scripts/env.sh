# Makes .venv and installs this checkout with everything tests need; sourced by the other scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
    exit 1
fi
stamp=".venv/.installed-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    echo "Installing into .venv (a minute or two) ..." >&2
    if ! .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
        --editable '.[export,cpu,tensorrt-rtx,grammar,serve,ray,dev]' >.venv/install.log 2>&1; then
        tail -n 20 .venv/install.log >&2
        exit 1
    fi
    touch "$stamp"
fi
