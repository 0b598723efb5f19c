"""A model of transformers behind HTTP on this machine: what training uses of vLLM's and SGLang's dialect."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM

KEY = "sk-secret-0123456789"


def fingerprint(model: Any) -> bytes:
    """Of the weights, to the last bit."""
    return b"".join(value.detach().contiguous().numpy().tobytes() for _, value in sorted(model.state_dict().items()))


class Served:
    """model: what it answers with, until it is told to load another. deaf: told so, it does nothing and says it did.

    asked: each request with its path and the fingerprint of the model that answers. changes: what is done to a reply.
    """

    def __init__(self, model: Any, names: tuple[str, ...] = ("tiny",), tokenizer: Any = None) -> None:
        self.model, self.names, self.tokenizer = model.eval(), names, tokenizer
        self.deaf, self.down = False, False
        self.adapters: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any], bytes]] = []
        self.changes: list[Any] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.url = ""

    def samples(self) -> list[tuple[dict[str, Any], bytes]]:
        """Requests for samples, without those that only look."""
        return [(r, of) for path, r, of in self.asked if path == "/v1/completions" and r["temperature"] > 0]

    # ---- what is asked

    def reply(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        """The status, and JSON or plain bytes."""
        if self.down:
            return 503, b""
        model = self.adapters.get(request.get("model", ""), self.model)
        self.asked.append((path, request, fingerprint(model)))
        if path == "/v1/models":
            adapters = [{"id": name, "parent": self.names[0]} for name in self.adapters]
            return 200, {"data": [*({"id": name, "parent": None} for name in self.names), *adapters]}
        if path == "/v1/completions":
            if request["model"] not in (*self.names, *self.adapters):
                return 404, {"error": {"message": "no such model"}}
            listed = request.get("prompt_logprobs")
            return 200, self.taught(model, request, listed) if listed else self.completions(model, request)
        if path == "/tokenize" and self.tokenizer is not None:
            return 200, {"tokens": self.tokenizer.encode(request["prompt"], add_special_tokens=False)}
        return self.told(path, request)

    def told(self, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        if path == "/collective_rpc" and request["method"] == "reload_weights":
            self.load(request["kwargs"]["weights_path"])
            return 200, {"results": [None]}
        if path == "/update_weights_from_disk":
            self.load(request["model_path"])
            return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}
        name = request.get("lora_name")
        if path == "/v1/load_lora_adapter" and name not in self.adapters:
            self.adapters[str(name)] = self.adapter(request["lora_path"])
        elif path == "/v1/unload_lora_adapter" and name in self.adapters:
            del self.adapters[str(name)]
        elif path != "/reset_prefix_cache":
            return 404, {"detail": "Not Found"}
        return 200, b"Success: as plain text, or nothing"

    def load(self, path: str) -> None:
        if not self.deaf:
            self.model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()

    def adapter(self, path: str) -> Any:
        import copy  # noqa: PLC0415

        from peft import PeftModel  # noqa: PLC0415

        return PeftModel.from_pretrained(copy.deepcopy(self.model), path).merge_and_unload().eval()

    # ---- what is answered

    @torch.no_grad()
    def completions(self, model: Any, request: dict[str, Any]) -> dict[str, Any]:
        """All that are made of a request have its seed, as in SGLang's deterministic mode."""
        generator = torch.Generator().manual_seed(request["seed"])
        ids, logps = list(request["prompt"]), []
        while len(logps) < request["max_tokens"]:
            row = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            greedy = request["temperature"] == 0
            token = int(row.argmax() if greedy else torch.multinomial(row.exp(), 1, generator=generator))
            ids.append(token)
            logps.append(float(row[token]))
            if token in request["stop_token_ids"]:
                break
        tokens = ids[len(request["prompt"]) :]
        choice = {
            "text": "", "token_ids": tokens, "prompt_token_ids": request["prompt"],
            "finish_reason": "stop" if tokens[-1] in request["stop_token_ids"] else "length",
            "logprobs": {"token_logprobs": logps, "tokens": ["" for _ in logps], "top_logprobs": []},
        }  # fmt: skip
        return {"model": request["model"], "choices": [{"index": i, **choice} for i in range(request["n"])]}

    @torch.no_grad()
    def taught(self, model: Any, request: dict[str, Any], count: int) -> dict[str, Any]:
        tokens = request["prompt"]
        rows = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        places: list[Any] = [None]
        for row, token in zip(rows, tokens[1:], strict=False):
            ids = {token, *row.topk(count).indices.tolist()}
            places.append({str(i): {"logprob": float(row[i]), "rank": 1, "decoded_token": ""} for i in ids})
        return {"model": request["model"], "choices": [{"index": 0, "text": "", "prompt_logprobs": places}]}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, request: dict[str, Any]) -> None:
        served: Served = self.server.served  # type: ignore[attr-defined]
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        with served.lock:
            status, content = served.reply(self.path, request)
            for change in served.changes:
                content = change(self.path, content)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(BrokenPipeError):  # nobody waits any more
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(model: Any, **options: Any) -> Iterator[Served]:
    """The server, on a port of its own, while it is open. The environment needs the key, and no proxy."""
    served = Served(model, **options)
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.served, served.url = served, f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield served
    finally:
        served.closing.set()
        server.shutdown()
        server.server_close()
