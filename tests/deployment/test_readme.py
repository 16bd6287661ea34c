"""The README: what it tells a stranger to type must be what the contract, the settings and the repository hold."""

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor

from tests.deployment.contract import find_method, find_route, new_message
from tests.deployment.dockerfile import DOCKERFILE, REPOSITORY
from tests.deployment.variables import table_rows

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
API = "/api/v1/model-training"


@dataclass(frozen=True)
class Command:
    """A `curl` or `call` in the README, in words, and the `jq` path that its answer is read by."""

    words: list[str]
    answer_path: list[str]


def read_commands(program: str, text_of: str = README) -> Iterator[Command]:
    for block in re.findall(r"```sh\n(.*?)```", text_of, re.DOTALL):
        for line in block.splitlines():
            if not (found := re.search(rf"(?:^|\$\(){program} (.*)", line)):
                continue
            text = re.sub(r"\$\(base64[^)]*\)", "AAAA", found[1])
            text, _, reading = text.partition(" | jq -r ")
            text = re.sub(r"\s+# .*", "", text)
            text = text.removesuffix(")") if found[0].startswith("$(") and not reading else text
            yield Command(shlex.split(text), [part for part in reading.rstrip(")").split(".") if part])


def has_path(message: Descriptor | None, path: list[str], spelling: str) -> bool:
    """Tell whether a message has the field at `path`, each spelt as the attribute `spelling` says."""
    for name in path:
        fields = {getattr(field, spelling): field for field in message.fields} if message else {}
        if name not in fields:
            return False
        message = fields[name].message_type
    return True


CURL = list(read_commands("curl"))
GRPCURL = list(read_commands("call"))


def test_there_are_ten_lines_for_each_way_in() -> None:
    assert len(CURL) >= 8
    assert len(GRPCURL) >= 8


@pytest.mark.parametrize("command", CURL, ids=lambda command: command.words[1])
def test_each_curl_line_calls_a_promised_path_with_fields_that_exist(command: Command) -> None:
    words = command.words
    address = urlsplit(next(word for word in words if word.startswith("$api")).replace("$api", API))
    data = next((words[place + 1] for place, word in enumerate(words) if word in ("-d", "--data-binary")), None)
    verb = words[words.index("-X") + 1] if "-X" in words else ("GET" if data is None else "POST")
    route = find_route(verb, re.sub(r"\$\w+", "some_id", address.path))
    request = route.method.input_type
    assert set(parse_qs(address.query)) <= set(request.fields_by_name)
    if data and data.startswith("@"):
        assert (REPOSITORY / data[1:]).is_file()
    elif route.body:
        sent = request if route.body == "*" else request.fields_by_name[route.body].message_type
        assert sent is not None
        json_format.ParseDict(json.loads(data or "{}"), new_message(sent))
    assert has_path(route.method.output_type, command.answer_path, "name")


@pytest.mark.parametrize("command", GRPCURL, ids=lambda command: command.words[0])
def test_each_grpcurl_line_calls_a_method_with_fields_that_exist(command: Command) -> None:
    name, body = command.words
    method = find_method(name)
    json_format.ParseDict(json.loads(body), new_message(method.input_type))
    # grpcurl prints JSON's usual camelCase, unlike our REST.
    assert has_path(method.output_type, command.answer_path, "json_name")


def test_both_ways_take_the_same_steps() -> None:
    routes = [find_method(command.words[0]).full_name for command in GRPCURL]
    assert {"CreateFineTunedModel", "WatchTrainingJob", "Generate", "StreamGenerate", "CreateRagModel", "RagGenerate", "DeleteModel"} <= {
        name.rpartition(".")[2] for name in routes
    }
    ten_lines = README.partition("## Ten lines of curl")[2].partition("\n## ")[0]
    assert len(list(read_commands("curl", ten_lines))) == len(GRPCURL)


def test_the_table_of_variables_is_the_settings() -> None:
    rows = [line for line in README.splitlines() if re.match(r"\| `[A-Z_]+` \|", line)]
    assert rows == table_rows()


def test_the_tree_names_only_what_is_there() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    parent = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        parent = parent if line.startswith("  ") else name
        path = f"{parent}{name}" if line.startswith("  ") else name
        assert (REPOSITORY / path).exists(), path


def test_every_link_and_command_leads_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (REPOSITORY / link).exists(), link
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE)):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
    for module in set(re.findall(r"`python -m (benchmarks\.\w+)`", README)):
        assert importlib.util.find_spec(module) is not None, module
    assert DOCKERFILE.relative_to(REPOSITORY).as_posix() in README


def test_the_readme_builds_and_runs_the_image_as_promised() -> None:
    assert "docker build -t llm-platform/model-training -f deployment/docker/Dockerfile.model_training ." in README
    assert re.search(r"^docker run -p 8003:8003 .*llm-platform/model-training", README, re.MULTILINE)
    assert "docker-compose up model-training" in README
