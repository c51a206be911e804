"""Refusals as a Qdrant 1.x server puts them on the wire: a status code, a text, sometimes trailing metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

_NOT_FOUND = re.compile(r"No point with id (\S+)")
_BAD_INPUT = ("Vector dimension error", "Not existing vector name", "Validation failed")


class ApiError(Exception):
    """A call that ends with `code` and `text`."""

    def __init__(
        self, code: grpc.StatusCode, text: str, trailing: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(f"{code.name}: {text}")
        self.code, self.text, self.trailing = code, text, trailing


def invalid(text: str) -> ApiError:
    """A message that cannot be read."""
    return ApiError(grpc.StatusCode.INVALID_ARGUMENT, text)


def bad_input(text: str) -> ApiError:
    """A message that does not fit what is stored."""
    return invalid(f"Wrong input: {text}")


def empty_update() -> ApiError:
    """A write of no points at all."""
    return invalid("Bad request: Empty update request")


def validation(field: str, text: str) -> ApiError:
    """A field outside its limits."""
    return invalid(f"Validation error in body: [{field}: {text}]")


def not_found(text: str) -> ApiError:
    """Something that is not there."""
    return ApiError(grpc.StatusCode.NOT_FOUND, f"Not found: {text}")


def no_collection(name: str) -> ApiError:
    """Neither a collection nor an alias."""
    return not_found(f"Collection `{name}` doesn't exist!")


def collection_exists(name: str) -> ApiError:
    """A name that is taken by a collection."""
    text = f"Wrong input: Collection `{name}` already exists!"
    return ApiError(grpc.StatusCode.ALREADY_EXISTS, text)


def unimplemented(what: str) -> ApiError:
    """Something the real server can do and the stand-in cannot."""
    return ApiError(grpc.StatusCode.UNIMPLEMENTED, f"the Qdrant stand-in has no {what}")


def unauthenticated(text: str) -> ApiError:
    """A missing or wrong API key."""
    return ApiError(grpc.StatusCode.UNAUTHENTICATED, text)


@contextmanager
def engine_call() -> Iterator[None]:
    """Maps what the engine raises, bare Exceptions and panics that are BaseExceptions, as the server maps it."""
    try:
        yield
    except (ApiError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise _of_engine(str(error)) from error


def _of_engine(text: str) -> ApiError:
    if missing := _NOT_FOUND.search(text):
        return not_found(f"No point with id {missing[1]} found")
    if text.startswith(_BAD_INPUT):
        return bad_input(text)
    return ApiError(grpc.StatusCode.INTERNAL, f"Service internal error: {text}")
