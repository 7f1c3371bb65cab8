"""What a server allows, and its answers to what it does not. Only the standard library is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_BODY = 65_536  # bytes of a request
MAX_STEPS = 16  # of a picture; the model is made for 2
READ_SECONDS = 10.0  # in which a request has to arrive
LINGER_SECONDS = 1.0  # in which a client can read why its connection is being closed
KEEP_ALIVE_SECONDS = 15  # of a connection without a request; longer than common clients keep theirs
GRACE_SECONDS = 60  # after SIGTERM, for what runs


@dataclass(frozen=True)
class Settings:
    """Limits of a server.

    Attributes:
        batch_delay: seconds that a picture waits at most for others to be drawn with.
        max_batch: most pictures that are drawn together.
        max_queue: most pictures that wait; a request that does not fit is answered 429.
        max_images: most pictures of a request.
        max_prompt: most characters of a prompt and of a negative prompt.
        hosts: names by which requests may call the server, in their Host header; None for any.
        token: the bearer token that clients have to send, or None.

    Raises:
        ValueError: for a queue that cannot hold a batch, or a request.
    """

    batch_delay: float = 0.005
    max_batch: int = 32
    max_queue: int = 256
    max_images: int = 16
    max_prompt: int = 1000
    hosts: tuple[str, ...] | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_images"):
            if getattr(self, name) > self.max_queue:
                numbers = f"{name} is {getattr(self, name)} and max_queue {self.max_queue}"
                raise ValueError(f"{numbers}: these pictures wait together, so give a larger max_queue")


class Refused(Exception):
    """A request that gets no pictures.

    Attributes:
        status: of the answer.
        param: the argument that is wrong, if it is one.
        code: OpenAI's word for what is wrong, or None.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer in OpenAI's shape, which fills the exceptions of its clients."""
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
