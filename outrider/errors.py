"""The errors of Outrider, by whose fault they are.

    OutriderError
    ├── InvalidRequest       the caller's input is wrong and stays wrong   INVALID_ARGUMENT
    │   ├── UnknownModel     nobody serves the model asked for             NOT_FOUND
    │   └── UnknownGeneration   no such generation of this tenant's        NOT_FOUND
    ├── Exhausted            no room now; try again later                  RESOURCE_EXHAUSTED
    ├── Unavailable          no worker could be reached                    UNAVAILABLE
    │   └── RegistryUnavailable   Redis could not                          (degrades, never fatal)
    ├── StaleEpoch           somebody else holds the session now           ABORTED
    ├── Mismatch             fingerprints or versions do not fit           FAILED_PRECONDITION
    ├── ModelLoadError       a model cannot be loaded or addressed         (start-up)
    ├── ConfigError          a setting is wrong                            (start-up)
    └── InternalError        a defect of ours                              INTERNAL

Each carries a message for people; `InvalidRequest` also names the field at fault.
The mapping to gRPC status lives in `outrider.serving.status`, nowhere else.
"""


class OutriderError(Exception):
    """Base of all errors that Outrider raises on purpose."""


class InvalidRequest(OutriderError):
    """A request that is wrong and stays wrong, however often it is sent."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class UnknownModel(InvalidRequest):
    """A request for a model that nobody serves."""


class UnknownGeneration(InvalidRequest):
    """A request to resume what is not, or no longer, there, or is somebody else's."""


class Exhausted(OutriderError):
    """No room now; the same request may succeed later or elsewhere."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When there will probably be room; None: nobody knows."""


class Unavailable(OutriderError):
    """No worker could be reached that would serve the request."""


class RegistryUnavailable(Unavailable):
    """Redis cannot be reached, is too slow, or refuses what it is asked."""


class StaleEpoch(OutriderError):
    """A message of an older epoch than the session's."""

    def __init__(self, message: str, current_epoch: int) -> None:
        super().__init__(message)
        self.current_epoch = current_epoch


class Mismatch(OutriderError):
    """Two parties whose fingerprints or versions do not fit together."""


class ModelLoadError(OutriderError):
    """A model that cannot be loaded, or whose attention cannot be addressed."""


class ConfigError(OutriderError):
    """A setting that is wrong."""


class InternalError(OutriderError):
    """A defect of ours."""
