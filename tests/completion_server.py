"""A server of the completions API with a tiny model behind it, and the mishaps of a large one.

It answers in threads, by the model's own `generate` and logits, as vLLM does where it is asked the same.
"""

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from medistill_trl.model_source import ModelSource
from medistill_trl.served_teacher import ServedTeacher
from medistill_trl.teacher import Teacher
from medistill_trl.teacher_server import TeacherServer

MODEL_LOCK = threading.Lock()


class Server(ThreadingHTTPServer):
    """Listens on a port of its own, or on a given one.

    Args:
        answer: From a request's body to (HTTP status, answer).
        models: Name → longest context.
        key: That requests must bring.

    Attributes:
        errors: Of its own, which no test provokes.
        faults: Taken one for each request, until none is left: a status, `drop`, `abort`, `text`, or seconds to wait.
        asked: Bodies of all requests that were answered.
        headers: Of all requests for a completion.
        most: Requests that were under way at the same time.
        answers_left: It stops listening after so many; None for never.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[dict], tuple[int, dict]], models=None, key=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.models, self.key = answer, models or {"tiny": None}, key
        self.faults, self.asked, self.headers = [], [], []
        self.most = self.under_way = 0
        self.answers_left: int | None = None
        self.errors: list[BaseException] = []
        self.counting = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def get_request(self):
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def die(self) -> None:
        """As a killed process: nobody listens, and every connection is reset."""
        self.shutdown()
        self.server_close()
        for connection in self._open:
            reset(connection)

    def handle_error(self, request, client_address):
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.errors.append(error)


def reset(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # closed already


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *words):
        pass

    def do_GET(self):
        served = [{"id": name, "max_model_len": most} for name, most in self.server.models.items()]
        self._send(200, {"object": "list", "data": served})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.counting:
            server.headers.append(dict(self.headers))
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            fault = server.faults.pop(0) if server.faults else None
        try:
            self._answer(body, fault)
        finally:
            with server.counting:
                server.under_way -= 1

    def _answer(self, body: dict, fault) -> None:
        server = self.server
        if fault == "drop":
            reset(self.connection)
            self.close_connection = True
            return
        if fault == "abort":
            self._send(200, {"choices": [{"text": "half", "finish_reason": "abort"}]})
            return
        if fault == "text":
            self._send(200, "<html>not me</html>")
            return
        if isinstance(fault, int):
            self._send(fault, {"error": {"message": f"fault {fault}"}}, {"Retry-After": "0"})
            return
        time.sleep(fault or 0.0)
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            self._send(401, {"error": f"wrong key {self.headers['Authorization']}"})
            return
        if body["model"] not in server.models:
            self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        with server.counting:
            if server.answers_left == 0:
                threading.Thread(target=server.die).start()
                time.sleep(5)
                return
            server.answers_left = server.answers_left and server.answers_left - 1
        status, answer = server.answer(body)
        server.asked.append(body)
        self._send(status, answer)

    def _send(self, status: int, content, headers=()) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(*args, **kwargs):
    server = Server(*args, **kwargs)
    try:
        yield server
    finally:
        server.die()
    assert server.errors == []


def serve_teacher(server: Server, teacher: Teacher, name: str = "tiny") -> ServedTeacher:
    """The same teacher behind a server."""
    model = teacher.model
    source = ModelSource("tiny", "tiny", None, model.config, "sha256:tiny")
    reached = TeacherServer(server.url, name, timeout=30, wait=5, in_flight=4)
    ends, device = model.generation_config.eos_token_id, torch.device("cpu")
    return ServedTeacher(reached, source, teacher.tokenizer, teacher.form, ends, device)


def model_answers(
    model, tokenizer, limit: int = 512, max_logprobs: int | None = None
) -> Callable[[dict], tuple[int, dict]]:
    """What a server with this model answers.

    Args:
        limit: Of its context.
        max_logprobs: Log-probabilities it gives of a token; None for all.
    """

    def refused(message: str) -> tuple[int, dict]:
        return 400, {"error": {"message": message, "type": "BadRequestError"}}

    def answer(body: dict) -> tuple[int, dict]:
        ids = body["prompt"]
        if len(ids) + body["max_tokens"] > limit:
            return refused(f"This model's maximum context length is {limit} tokens.")
        if body.get("seed", 0) >= 2**63:
            return refused("seed: Input should be less than or equal to 9223372036854775807")
        k = body.get("prompt_logprobs", 0)
        if max_logprobs is not None and k > max_logprobs:
            return refused(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {max_logprobs}"
            )
        with MODEL_LOCK, torch.no_grad(), torch.random.fork_rng():
            torch.set_num_threads(1)
            choice = _generate(model, tokenizer, body)
            if "prompt_logprobs" in body:
                choice["prompt_logprobs"] = _prompt_log_probs(model, ids, body["prompt_logprobs"])
        return 200, {"object": "text_completion", "choices": [choice]}

    return answer


def _generate(model, tokenizer, body: dict) -> dict:
    sampled, how = body["temperature"] > 0, {}
    if sampled:
        torch.manual_seed(body["seed"])
        how = {name: body[name] for name in ("temperature", "top_p")}
        how["top_k"] = max(0, body["top_k"])
    ids = model.generate(
        torch.tensor([body["prompt"]]),
        max_new_tokens=body["max_tokens"],
        do_sample=sampled,
        stop_strings=body.get("stop"),
        tokenizer=tokenizer,
        eos_token_id=body.get("stop_token_ids"),
        use_cache=True,
        **how,
    )[0, len(body["prompt"]) :].tolist()
    ended = ids[-1] in body.get("stop_token_ids", [])
    text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
    stop = next((stop for stop in body.get("stop", []) if stop in text), None)
    return {
        "text": text.partition(stop)[0] if stop else text,
        "token_ids": ids,
        "finish_reason": "stop" if ended or stop else "length",
        "stop_reason": stop,
    }


def _prompt_log_probs(model, ids: list[int], k: int) -> list[dict | None]:
    """Of each token the k likeliest and itself, in no order to rely on."""
    log_probs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    found: list[dict | None] = [None]
    for place, own in enumerate(ids[1:]):
        chosen = {own, *log_probs[place].topk(k).indices.tolist()}
        found.append({str(id): {"logprob": log_probs[place, id].item()} for id in sorted(chosen)})
    return found
