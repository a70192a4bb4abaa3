#!/usr/bin/env bash
# Builds wheels of this project and of the plugin beside this script, installs them into a fresh environment, and uses them
# there, away from the checkout: listing, conformance, training, evaluation and prediction.  check.sh [PYTHON]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
python=${1:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
cd "$project" # a copy, since building leaves its traces beside the source
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -cf - -T - | tar -xf - -C "$work/source"

"$python" -m venv "$work/venv"
cd "$work"
pip() { venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
pip wheel --no-deps --wheel-dir wheels ./source ./source/tests/external_plugin
pip install --constraint source/constraints.txt wheels/*.whl
cp source/tests/external_plugin/config.yaml .
rm -rf source
unset PYTHONPATH
export PATH="$work/venv/bin:$PATH"

echo "== what is installed"
python -c 'import glyphs, mtl, mtl_tasks; print(*(m.__file__ for m in (mtl, mtl_tasks, glyphs)), sep="\n")'
mtl tasks | grep -E '^glyphs_(letter|tilt) +crosstitch-glyphs 0.1.0$'
echo "== conformance"
mtl check-plugin glyphs_letter glyphs_tilt
echo "== training"
mtl train config.yaml --run-dir run --json >result.json
python - <<'PYTHON'
import json
test = json.load(open("result.json"))["test"]
print(json.dumps(test, indent=2))
assert test["glyphs_letter"]["accuracy"] > 0.9, test
assert test["glyphs_tilt"]["error_degrees"] < 20, test
PYTHON
echo "== evaluation and prediction"
mtl evaluate run --json | python -c 'import json, sys; assert json.load(sys.stdin)["score"] == json.load(open("result.json"))["test"]["score"]'
python -c 'import numpy as np; from glyphs.data import draw; np.save("x.npy", [[draw("T", 0.5, np.random.default_rng(0))]])'
mtl predict run x.npy
