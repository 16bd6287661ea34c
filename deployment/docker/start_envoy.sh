#!/bin/sh
# Fills in the gateway's template and becomes Envoy: what `python -m server up` does, for a container that has no Python.
# Reads BIND_ADDRESS, HTTP_PORT, GRPC_HOST, GRPC_PORT, TEMPLATE and DESCRIPTOR; arguments go to Envoy.
set -eu
# Envoy tells YAML by the name.
configuration=$(mktemp -d)/envoy.yaml
sed -e "s|\$bind_address|$BIND_ADDRESS|g" \
    -e "s|\$http_port|$HTTP_PORT|g" \
    -e "s|\$grpc_host|$GRPC_HOST|g" \
    -e "s|\$grpc_port|$GRPC_PORT|g" \
    -e "s|\$descriptor_path|$DESCRIPTOR|g" \
    "$TEMPLATE" > "$configuration"
exec envoy --config-path "$configuration" --disable-hot-restart --concurrency 2 --log-level warning "$@"
