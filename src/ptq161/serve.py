"""An OpenAI-compatible server for one model: its routes, errors and life, from the socket to Ctrl-C."""

import json
import socket
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers.cli.serving.utils import GenerationState

from ptq161.errors import InputError
from ptq161.handlers import ChatCompletions, Completions, Responses, Served, Stopping

ERROR_MARK, ERROR_END = 'data: {"error": "', '"}\n\n'  # around the message of an error in a stream of transformers
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(message)s", "datefmt": "%H:%M:%S"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "uvicorn.error": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "uvicorn.access": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


def application(served: Served) -> FastAPI:
    """The routes. Every error is a JSON object in OpenAI's form."""
    app = FastAPI(title="ptq161", openapi_url=None)
    state = GenerationState()
    entry = {"id": served.name, "object": "model", "created": served.created, "owned_by": "ptq161"}

    def post(path: str, handler: ChatCompletions | Completions | Responses) -> None:
        async def answer(body: dict[str, Any]) -> Response:
            response: Response = await handler.handle_request(body, uuid4().hex)
            if isinstance(response, StreamingResponse):
                last = "" if isinstance(handler, Responses) else "data: [DONE]\n\n"
                response.body_iterator = _as_openai_sends(response.body_iterator, last)
            return response

        app.add_api_route(path, answer, methods=["POST"])

    post("/v1/chat/completions", ChatCompletions(served, state))
    post("/v1/completions", Completions(served, state))
    post("/v1/responses", Responses(served, state))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        if name != served.name:
            raise HTTPException(404, f"there is no model {name!r}: this server has {served.name!r}")
        return entry

    _add_errors(app)
    return app


def _error(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _as_openai_sends(events: AsyncIterable[Any], last: str) -> AsyncIterator[Any]:
    """The events of a stream and a last one; an error, which transformers gives as a string, becomes an object."""
    async with aclosing(aiter(events)) as open_events:  # type: ignore[type-var]
        async for event in open_events:
            before, mark, message = event.rpartition(ERROR_MARK)
            if mark:
                event = f"{before}data: {json.dumps(_error(500, message.removesuffix(ERROR_END)))}\n\n"
            yield event
    yield last


def _add_errors(app: FastAPI) -> None:
    def reply(status: int, message: str) -> JSONResponse:
        return JSONResponse(_error(status, message), status)

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
        return reply(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return reply(400, "expected a JSON object, sent as Content-Type: application/json")

    @app.exception_handler(InputError)
    @app.exception_handler(TemplateError)
    async def refused_by_us(_: Request, error: Exception) -> JSONResponse:
        return reply(400, str(error))

    @app.exception_handler(LookupError)  # the handlers look up what they need and check little
    @app.exception_handler(TypeError)
    @app.exception_handler(ValueError)
    async def misunderstood(_: Request, error: Exception) -> JSONResponse:
        return reply(400, f"the request cannot be understood: {type(error).__name__}: {error}")

    @app.exception_handler(Stopping)
    async def stopped(_: Request, error: Stopping) -> JSONResponse:
        return reply(503, str(error))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return reply(500, f"{type(error).__name__}: {error}")


class Server(uvicorn.Server):
    """Stops the answer being written, too, when it is told to stop."""

    def __init__(self, served: Served, *, access_log: bool) -> None:
        super().__init__(
            uvicorn.Config(
                application(served),
                log_config=LOGGING,
                access_log=access_log,
                lifespan="off",
                timeout_graceful_shutdown=10,  # seconds; a long prompt is not interrupted
            )
        )
        self.served = served

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called with SIGINT or SIGTERM."""
        self.served.stopping.set()
        super().handle_exit(sig, frame)


def run(served: Served, listener: socket.socket, *, access_log: bool) -> None:
    """Serve until Ctrl-C, then return."""
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal anew when it has shut down
        Server(served, access_log=access_log).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to from now on. Raises InputError if that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host} port {port}: {reason}; choose with --host and --port") from error


def url_of(listener: socket.socket) -> str:
    """What a client takes as `base_url`."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def name_of(path: str) -> str:
    """What clients call the model at this path: the folder's name, a .gguf file's without the ending, a hub name."""
    place = Path(path)
    if not place.exists():
        return path
    return place.stem if place.is_file() else place.resolve().name
