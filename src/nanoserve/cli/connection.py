"""A client for `generate` and `chat`: of a server elsewhere, or of one that is started in this process.

The server in this process is the one that `nanoserve serve` runs, so that both ways lead through the same code.
"""

import argparse
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import TypeVar

from nanoserve_client import AsyncClient, Client, Model, NanoserveError, Tls, Unavailable

from nanoserve.cli.loading import Loading
from nanoserve.cli.sources import Choices
from nanoserve.cli.terminal import CommandError, StatusLine
from nanoserve.config import ENGINE_SECTIONS, ClientOptions, ConfigError
from nanoserve.local import LocalServer

_Client = TypeVar("_Client", Client, AsyncClient)


@contextlib.contextmanager
def connected(arguments: argparse.Namespace, status_line: StatusLine | None) -> Iterator[tuple[Client, Model]]:
    """A client whose server is ready, and the model that it serves.

    Raises ConfigError or CommandError if there is no such server.
    """
    choices = Choices.of(arguments)
    remote = choices.client_options()
    if remote.target is not None:
        if useless := choices.flags(*ENGINE_SECTIONS):
            raise CommandError(f"{', '.join(useless)} would change nothing: --target says that another process serves")
        with remote_client(remote, Client) as client:
            yield client, served_by(client, remote.target)
        return
    if useless := choices.flags("client"):
        raise CommandError(f"{', '.join(useless)} would change nothing without --target: the model is in this process")
    options = choices.options()
    try:
        with choices.origins_in_errors(), Loading(status_line) as loading:
            server = LocalServer(options, loading.report)
    except KeyboardInterrupt:
        # Nothing can stop a thread that loads a model.
        os._exit(128 + signal.SIGINT)
    try:
        with server.client() as client:
            yield client, served_by(client, server.address)
    finally:
        server.stop()


def needed_server(arguments: argparse.Namespace) -> tuple[str, ClientOptions]:
    """The address of the server that a command cannot do without, and how to reach it. Raises ConfigError."""
    remote = Choices.of(arguments).client_options()
    if remote.target is None:
        raise ConfigError("--target is missing; it is the address of the server, such as 127.0.0.1:50051")
    return remote.target, remote


def remote_client(remote: ClientOptions, kind: type[_Client]) -> _Client:
    """A client of the server at the target, which there must be. Raises CommandError."""
    assert remote.target is not None
    files = remote.tls_ca, remote.client_cert, remote.client_key
    try:
        return kind(remote.target, api_key=remote.api_key, tls=Tls(*files) if remote.tls or any(files) else None)
    except OSError as error:
        raise CommandError(f"cannot read {error.filename}: {error.strerror}") from None


def served_by(client: Client, address: str) -> Model:
    """The model, once the server says that it is there. Raises CommandError."""
    with telling_of(address):
        return client.list_models()[0]


@contextlib.contextmanager
def telling_of(address: str | None) -> Iterator[None]:
    """Errors of a first call become a CommandError that says what to do."""
    try:
        yield
    except Unavailable as error:
        raise CommandError(f"no server is ready at {address} ({error.message}); `nanoserve serve` starts one") from None
    except (NanoserveError, ValueError) as error:
        raise CommandError(f"the server at {address} refuses: {error}") from None
