#!/usr/bin/env bash
# Tests the launchers on a real SLURM of three nodes on this machine, which it installs (Debian's
# packages) where it may. Needs root, as the daemons do. With the argument `install` it ends there.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PACKAGES=(slurmctld slurmd slurm-client munge)

export PATH=$PATH:/usr/sbin
missing=()
for program in slurmctld slurmd sbatch munged; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "slurm-test: ${missing[*]} missing: install ${PACKAGES[*]} (Debian's names) and run it as root" >&2
        exit 1
    fi
    apt-get -q update
    DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends "${PACKAGES[@]}"
fi
[ "${1:-}" != install ] || exit 0
"$VENV/bin/python" -m pytest -q -m slurm tests/slurm
