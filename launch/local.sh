#!/usr/bin/env bash
# One process on this machine, CPU or one GPU:   launch/local.sh [CONFIG [a.b=c …]]
set -euo pipefail
exec python -m distgrow train "${1:-configs/digits.yaml}" "${@:2}"
