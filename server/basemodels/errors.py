"""What can be wrong with a base model. Messages name the model as the caller wrote it, never a path of this server.

ServiceError
├── FailedPrecondition
│   └── BaseModelUnavailable   BASE_MODEL_UNAVAILABLE  known by form, cannot be had here now
└── InvalidInput
    ├── BaseModelRefused       BASE_MODEL_REFUSED      pickled weights, code of its own, no weights
    └── RenderingRefused       a code of its own       a conversation that the model's template cannot express
"""

from server.domain.errors import FailedPrecondition, InvalidInput


class BaseModelUnavailable(FailedPrecondition):
    """The base model cannot be had here now: the hub is out of reach, access is missing, packaged weights are damaged."""

    default_reason = "BASE_MODEL_UNAVAILABLE"


class BaseModelRefused(InvalidInput):
    """The base model exists but is not loaded: pickled weights, code of its own, or no weights at all."""

    default_reason = "BASE_MODEL_REFUSED"


class RenderingRefused(InvalidInput):
    """The chat template cannot express this conversation faithfully; `reason` says how."""

    default_reason = "RENDERING_REFUSED"
