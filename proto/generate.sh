#!/bin/sh
# Generates gen/ (or the directory $1) from proto/: Python, its type stubs, gRPC, and modeltraining.binpb, the descriptor set that
# Envoy transcodes by. PYTHON names the interpreter that has grpcio-tools, mypy-protobuf and googleapis-common-protos.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${1:-gen}
BIN=$(dirname "$PYTHON")
SITE=$("$PYTHON" -c 'import google.rpc.status_pb2 as found, pathlib; print(pathlib.Path(found.__file__).parents[2])')

mkdir -p "$OUT"
rm -rf "$OUT/modeltraining" "$OUT/modeltraining.binpb"
"$PYTHON" -m grpc_tools.protoc -I proto -I "$SITE" --plugin=protoc-gen-mypy="$BIN/protoc-gen-mypy" \
    --python_out="$OUT" --mypy_out=quiet:"$OUT" proto/modeltraining/v1/*.proto
"$PYTHON" -m grpc_tools.protoc -I proto -I "$SITE" --plugin=protoc-gen-mypy_grpc="$BIN/protoc-gen-mypy_grpc" \
    --grpc_python_out="$OUT" --mypy_grpc_out=quiet:"$OUT" proto/modeltraining/v1/*_service.proto
touch "$OUT/modeltraining/__init__.py" "$OUT/modeltraining/v1/__init__.py" "$OUT/modeltraining/py.typed"
# Source info carries the comments, which a test reads; the error details are there so that Envoy can write them as JSON.
"$PYTHON" -m grpc_tools.protoc -I proto -I "$SITE" --include_imports --include_source_info \
    --descriptor_set_out="$OUT/modeltraining.binpb" proto/modeltraining/v1/*.proto google/rpc/error_details.proto
