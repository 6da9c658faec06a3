#!/bin/sh
# Usage: [PYTHON=interpreter] sh tools/find-python.sh VENV
# Makes the virtual environment VENV with the first Python >= 3.11 that can make one. A candidate
# is asked, not trusted: version managers leave commands on the path that only print an error.
set -u
venv=$1
needed="3.11"

version_of() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [ -x "$venv/bin/python" ] && new_enough "$venv/bin/python"; then
    echo "python: $venv/bin/python $(version_of "$venv/bin/python"), already there"
    exit 0
fi

seen=""
for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    path=$(command -v "$candidate" 2>/dev/null) || continue
    version=$(version_of "$candidate") || version=""
    if [ -z "$version" ]; then
        seen="$seen
  $path: does not run"
    elif ! new_enough "$candidate"; then
        seen="$seen
  $path: $version, too old"
    elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        seen="$seen
  $path: $version, but it cannot make a virtual environment (on Debian and Ubuntu:
    apt install python${version%.*}-venv)"
    else
        echo "python: found $path, $version"
        rm -rf "$venv"
        exec "$candidate" -m venv "$venv"
    fi
done

echo "error: needed Python >= $needed with venv, found:${seen:- no python on the path}" >&2
echo "hint: install Python 3.11 or newer (python.org, or your system's packages), or name one:" >&2
echo "      make PYTHON=/path/to/python3.12 ..." >&2
exit 2
