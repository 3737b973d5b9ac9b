#!/usr/bin/env bash
# The whole path on real cells with one command: set up, then counts -> SOMA -> shards -> VAE -> latents -> DiT ->
# generated cells -> evaluation and report, all below runs/quickstart.
#   bash launch/quickstart.sh [--h5ad cells.h5ad --condition cell_type --condition treatment] [--fresh] [--help]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(bash "$here/setup.sh" all)
exec "$python" -P -m launch.cli quickstart "$@" # which refuses wrong words before it imports what runs
