"""How a served engine is made to sample from new weights: it reads them from a directory, by the path that it is told.

A file system that both see is needed. To add an engine, write what it is told here and put it into `BY_NAME`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from prefixloss.io.endpoint import Endpoint, UnansweredError

Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Server(NamedTuple):
    """The engine's control plane, at its root. ask: reads the reply; tell: does not."""

    ask: Ask
    tell: Ask

    @classmethod
    def of(cls, endpoint: Endpoint, seconds: float, tries: int) -> Server:
        async def ask(path: str, request: dict[str, Any]) -> Any:
            return await endpoint.ask(path, request, seconds, tries)

        async def tell(path: str, request: dict[str, Any]) -> None:
            await endpoint.tell(path, request, seconds, tries)

        return cls(ask, tell)


class Reload(NamedTuple):
    """load: has the engine read a directory, given its path, a name for it and the name of what was loaded before, if
    anything. adapters: the directory has adapters alone, and responses are asked for under their name; else it has the
    whole model, which is asked for under its own.
    """

    load: Callable[[Server, str, str, str | None], Awaitable[None]]
    adapters: bool = False


async def vllm(server: Server, path: str, name: str, before: str | None) -> None:
    """All weights, in place. The endpoints are there with VLLM_SERVER_DEV_MODE=1, the path in versions of 2026."""
    reply = await server.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
    if not isinstance(reply, dict) or not isinstance(reply.get("results"), list) or not reply["results"]:
        raise UnansweredError('/collective_rpc: no "results", one a worker, in the reply')
    # what is cached was made with the weights before
    await server.tell("/reset_prefix_cache", {})


async def vllm_lora(server: Server, path: str, name: str, before: str | None) -> None:
    """The adapters alone. An engine that has not loaded them does not know their name, and nothing cached is theirs.

    The endpoints are there with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora.
    """
    await server.tell("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
    if before is not None:
        await server.tell("/v1/unload_lora_adapter", {"lora_name": before})


async def sglang(server: Server, path: str, name: str, before: str | None) -> None:
    """All weights, in place, and an empty cache."""
    reply = await server.ask("/update_weights_from_disk", {"model_path": path, "flush_cache": True})
    if not isinstance(reply, dict) or reply.get("success") is not True:
        message = reply.get("message") if isinstance(reply, dict) else reply
        raise UnansweredError(f"/update_weights_from_disk: no success: {message}")


BY_NAME = {
    "vllm": Reload(vllm),
    "vllm-lora": Reload(vllm_lora, adapters=True),
    "sglang": Reload(sglang),
}
