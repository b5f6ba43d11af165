#!/usr/bin/env bash
# Run the checks and the step benchmark of recipes/studies/gpu.py on a machine without a network and without an
# installation of this package:
#
#     bash recipes/studies/gpu.sh --fetch                # where there is a network: wheels of what the machine lacks
#     bash recipes/studies/gpu.sh --folder runs/gpu      # on the machine with the GPU, in this folder
#
# The machine has torch 2.11, transformers 5.17, accelerate and PyTorch's other companions. The wheels of the rest are
# in .whl/ and are unpacked into a temporary folder; nothing that is installed is replaced.
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=(peft==0.21.2 trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 typer==0.29.2
    pydantic==2.14.4 pydantic_core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 typing_extensions==4.16.0)

if [ "${1:-}" = --fetch ]; then
    PIP_CONSTRAINT='' exec python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d .whl "${wheels[@]}"
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/steertune"
for folder in adapters losses trainers recipes; do ln -s "$PWD/$folder" "$site/steertune/$folder"; done
if compgen -G '.whl/*.whl' >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
fi
export PYTHONPATH="$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m steertune.recipes.studies.gpu "$@"
