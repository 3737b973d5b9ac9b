#!/usr/bin/env bash
# Make scldm ready to run from this checkout, and print the path of the Python that has it; all else goes to stderr.
#   python=$(bash launch/setup.sh [EXTRAS])     EXTRAS as in pyproject.toml, by default all,test
# Takes the active virtual environment, else .venv beside pyproject.toml, made at need. Installs again only when
# pyproject.toml or constraints.txt has changed or an extra is asked for that is not there yet.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-all,test}
say() { echo "setup: $*" >&2; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [ -n "${VIRTUAL_ENV:-}" ]; then
    venv=$VIRTUAL_ENV
    if ! recent "$venv/bin/python"; then
        say "error: the active virtual environment $venv has no Python >= 3.11: deactivate it, or activate another"
        exit 2
    fi
else
    venv=$root/.venv
    if ! recent "$venv/bin/python"; then
        base=
        for candidate in python3 python3.13 python3.12 python3.11; do
            if recent "$candidate"; then
                base=$candidate
                break
            fi
        done
        if [ -z "$base" ]; then
            say "error: scldm needs Python >= 3.11; python3 here is $(python3 --version 2>&1 || true)"
            exit 2
        fi
        if [ -e "$venv" ] && [ ! -f "$venv/.scldm-made" ]; then
            say "error: $venv has no Python >= 3.11 and was not made by this script: rename it, or remove it"
            exit 2
        fi
        say "making $venv with $("$base" --version)"
        rm -rf "$venv"
        mkdir "$venv" && touch "$venv/.scldm-made" # ours from here on, also if this is killed
        "$base" -m venv "$venv" >&2 || { rm -rf "$venv"; say "error: $base -m venv failed"; exit 1; }
    fi
fi

stamp=$venv/.scldm-setup
wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
installed=
if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ]; then
    installed=$(tail -n 1 "$stamp")
fi
missing=
for extra in ${extras//,/ }; do
    case ",$installed," in
        *",$extra,"*) ;;
        *) missing=1 ;;
    esac
done
if [ -n "$missing" ]; then
    together=${installed:+$installed,}$extras
    say "installing scldm[$together] into $venv (about 2.4 GB, and 1 GB more for tests; a minute or two)"
    # --no-compile: modules are compiled when they are first imported, and most of them never are
    (cd "$root" && "$venv/bin/python" -m pip install --quiet --no-compile --no-input --disable-pip-version-check \
        -c constraints.txt -e ".[$together]") >&2
    printf '%s\n%s\n' "$wanted" "$together" >"$stamp"
fi
echo "$venv/bin/python"
