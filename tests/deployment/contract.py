"""The contract as a caller sees it: REST paths and gRPC methods, read from the committed descriptor set."""

import re
from dataclasses import dataclass
from functools import cache

from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.message import Message

from tests.deployment.dockerfile import REPOSITORY

PACKAGE = "modeltraining.v1"


@dataclass(frozen=True)
class Route:
    """One RPC with its REST face. `body` is the field that the HTTP body fills, `*` for all, empty for none."""

    method: MethodDescriptor
    verb: str
    pattern: re.Pattern[str]
    body: str


@cache
def read_routes() -> tuple[Route, ...]:
    """Read every RPC of the three services."""
    files = descriptor_pb2.FileDescriptorSet.FromString((REPOSITORY / "gen" / "modeltraining.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    services = [f"{file.package}.{service.name}" for file in files.file if file.package == PACKAGE for service in file.service]
    methods = [method for name in services for method in pool.FindServiceByName(name).methods]
    return tuple(_make_route(method) for method in methods)


def find_method(name: str) -> MethodDescriptor:
    """Find `Service/Method`."""
    full_name = f"{PACKAGE}.{name.replace('/', '.')}"
    return next(route.method for route in read_routes() if route.method.full_name == full_name)


def find_route(verb: str, path: str) -> Route:
    """Find the RPC behind a REST call."""
    return next(route for route in read_routes() if route.verb == verb and route.pattern.fullmatch(path))


def new_message(descriptor: Descriptor) -> Message:
    """Make an empty message of this type."""
    return message_factory.GetMessageClass(descriptor)()


def _make_route(method: MethodDescriptor) -> Route:
    # The option is an extension that only the generated pool knows: read it again through that one.
    options = descriptor_pb2.MethodOptions.FromString(method.GetOptions().SerializeToString())
    rule = options.Extensions[annotations_pb2.http]
    verb = str(rule.WhichOneof("pattern"))
    pattern = re.sub(r"\{\w+=\*\*\}", ".+", re.sub(r"\{\w+\}", "[^/]+", str(getattr(rule, verb))))
    return Route(method, verb.upper(), re.compile(pattern), rule.body)
