#!/bin/sh
# Checks the contract: buf format, buf lint, buf breaking against $BASE (default: main), and that gen/ is what proto/ generates.
# PYTHON names the interpreter of the environment that has buf-bin and the generators.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
BASE=${BASE:-main}
BUF=$(dirname "$PYTHON")/buf
SITE=$("$PYTHON" -c 'import google.rpc.status_pb2 as found, pathlib; print(pathlib.Path(found.__file__).parents[2])')
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# build_image PROTO_DIRECTORY IMAGE
build_image() {
    (cd "$1" && find modeltraining -name '*.proto' | sort) > "$WORK/files"
    # shellcheck disable=SC2046 # file names of this repository have no spaces
    "$PYTHON" -m grpc_tools.protoc -I "$1" -I "$SITE" --include_imports --include_source_info --descriptor_set_out="$2" $(cat "$WORK/files")
}

"$BUF" format proto --diff --exit-code
build_image proto "$WORK/now.binpb"
"$BUF" lint "$WORK/now.binpb" --config buf.yaml --path modeltraining

# A clone may know the base only as a remote branch, or not at all; the base may have no contract yet.
for name in "$BASE" "origin/$BASE"; do
    if git rev-parse --quiet --verify "$name^{commit}" > "$WORK/base"; then break; fi
done
if [ ! -s "$WORK/base" ]; then
    echo "buf breaking: there is no branch $BASE to compare with" >&2
elif [ -z "$(git ls-tree -r --name-only "$(cat "$WORK/base")" -- proto/modeltraining)" ]; then
    echo "buf breaking: $BASE has no contract to compare with" >&2
else
    mkdir "$WORK/base_tree"
    git archive "$(cat "$WORK/base")" proto | tar -x -C "$WORK/base_tree"
    build_image "$WORK/base_tree/proto" "$WORK/base.binpb"
    "$BUF" breaking "$WORK/now.binpb" --against "$WORK/base.binpb" --config buf.yaml --path modeltraining
fi

PYTHON=$PYTHON sh proto/generate.sh "$WORK/gen"
if ! diff -r -x __pycache__ "$WORK/gen" gen; then
    echo "gen/ is not what proto/ generates: run proto/generate.sh and commit the result" >&2
    exit 1
fi
