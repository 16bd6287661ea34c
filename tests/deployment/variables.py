"""The service's environment variables, as the settings declare them."""

from dataclasses import fields

from server.settings import Settings

_PLACES = {"{data}": "DATA_DIRECTORY", "{run}": "DATA_DIRECTORY/run"}


def variable_names() -> set[str]:
    """Give the names of all variables."""
    return {str(item.metadata["name"]) for item in fields(Settings)}


def table_rows() -> list[str]:
    """Give the rows of the README's table, in the settings' order."""
    return [_row(item.metadata["name"], item.metadata["default"], item.metadata["description"]) for item in fields(Settings)]


def _row(name: str, default: str, description: str) -> str:
    for place, shown in _PLACES.items():
        default = default.replace(place, shown)
    return f"| `{name}` | {f'`{default}`' if default else 'unset'} | {description} |"
