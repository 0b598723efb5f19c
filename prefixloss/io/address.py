"""Where a server is, and what it says of itself: its models, and a text as tokens."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from prefixloss.io.endpoint import KEY, UnansweredError, opened, run

_TRIES = 2
# the model's name is no part of the address, which may hold a name and a password of its own
_WHERE = re.compile(r"(?:(?P<model>.+?)@)?(?P<url>https?://.+)", re.DOTALL)


class Address(NamedTuple):
    """A server, and a model's name there; None where it was not said."""

    url: str
    model: str | None

    @classmethod
    def of(cls, text: str) -> Address | None:
        """From URL or MODEL@URL; None for any other text."""
        where = _WHERE.fullmatch(text)
        return cls(where["url"], where["model"]) if where else None

    def named(self, seconds: float) -> Address:
        """With the model's name, which need not be said where there is one only. UnansweredError: the server has not
        got it, several, or no answer.
        """
        names = run(_models(self.url, seconds))
        if self.model is None and len(names) == 1:
            return self._replace(model=names[0])
        if self.model in names:
            return self
        got = f"got {'no name' if self.model is None else repr(self.model)}"
        raise UnansweredError(f"{got}, expected MODEL@URL with one of the server's models: {', '.join(names)}")

    def tokens(self, text: str, seconds: float) -> list[Any]:
        """The model's token ids for a text, without special tokens, as vLLM says them. UnansweredError: no answer."""
        return run(_tokens(self, text, seconds))

    @property
    def root(self) -> str:
        """The server's own address, without the version of the API."""
        return self.url.rstrip("/").removesuffix("/v1")


async def _models(url: str, seconds: float) -> list[str]:
    """Names of the models that a server has, without adapters, which have a parent."""
    async with opened(url.rstrip("/"), KEY, 1 << 20) as endpoint:
        try:
            models = (await endpoint.ask("/models", None, seconds, _TRIES))["data"]
            return [model["id"] for model in models if not model.get("parent")]
        except (LookupError, TypeError, AttributeError):
            raise UnansweredError('no "data" with an "id" a model in the reply to /models') from None
        except Exception as error:
            raise UnansweredError(f"/models: {endpoint.reason(error)}") from None


async def _tokens(address: Address, text: str, seconds: float) -> list[Any]:
    request = {"model": address.model, "prompt": text, "add_special_tokens": False}
    async with opened(address.root, KEY, 65536 + 64 * len(text)) as endpoint:
        try:
            return list((await endpoint.ask("/tokenize", request, seconds, _TRIES))["tokens"])
        except (LookupError, TypeError):
            raise UnansweredError('no "tokens" in the reply to /tokenize') from None
        except Exception as error:
            raise UnansweredError(f"/tokenize: {endpoint.reason(error)}") from None
