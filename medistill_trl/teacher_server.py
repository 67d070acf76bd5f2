"""The HTTP side of a served teacher: many requests in flight, retries, and words for what goes wrong.

It speaks the OpenAI-compatible `/v1/models` and `/v1/completions`, as vLLM and SGLang serve them.

A request is tried again, after 0.5 s, 1 s, 2 s, … up to 30 s, while the server cannot be reached, drops the
connection, gives no answer in time or says 408, 429, 500, 502, 503 or 504; what it refuses for good is an error at once.
"""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TypeVar

import httpx2

from medistill_trl.arguments import TeacherArguments
from medistill_trl.errors import RunFailed, UserError, first_line

logger = logging.getLogger(__name__)

API_KEY = "MEDISTILL_TEACHER_API_KEY"  # of the environment; it is written nowhere
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
TOLD_EVERY = 30.0  # seconds between two words on a server that does not answer
CONNECT_SECONDS = 10.0
BAD_REQUEST = 400
RETRIED = {408, 429, 500, 502, 503, 504}
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class ServerLost(RunFailed):
    """The teacher's server has not answered for as long as the run may wait."""


class Refused(UserError):
    """The server will not answer this question.

    Args:
        status: Of HTTP.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class TeacherServer:
    """A server that answers for the teacher.

    Args:
        url: With the version, such as http://127.0.0.1:8000/v1.
        model: The name it serves the teacher under.
        timeout: Longest time of one answer, seconds.
        wait: How long a request is tried again, seconds.
        in_flight: Requests under way at a time, at most.
    """

    url: str
    model: str
    timeout: float
    wait: float
    in_flight: int
    _silent_since: float | None = field(default=None, repr=False)
    _told: float = field(default=0.0, repr=False)

    def each(
        self,
        ask: Callable[["Asking", Item], Awaitable[Answer]],
        items: Sequence[Item],
    ) -> Iterator[list[tuple[int, Answer]]]:
        """The answers to many questions as they arrive, each with its question's place.

        No more than `in_flight` are under way, and none is begun that nobody has asked the iterator for. Leaving it
        early, or an error, ends those under way.

        Args:
            ask: Puts one question.

        Raises:
            ServerLost: no answer, for `wait` seconds.
            UserError: the server refuses a question.
        """
        left = iter(enumerate(items))
        with asyncio.Runner() as runner:
            loop, client = runner.get_loop(), self._client()
            asking = Asking(self, client)
            under_way: dict[asyncio.Task, int] = {}
            try:
                while True:
                    for place, item in itertools.islice(left, self.in_flight - len(under_way)):
                        under_way[loop.create_task(ask(asking, item))] = place
                    if not under_way:
                        return
                    done = runner.run(_first_of(under_way))
                    yield [(under_way.pop(task), task.result()) for task in done]
            finally:
                for task in under_way:
                    task.cancel()
                runner.run(_closed(client, under_way))

    def _client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            headers=_headers(),
            timeout=httpx2.Timeout(self.timeout, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=self.in_flight),
        )

    def silent(self, reason: str) -> None:
        """A request has failed; says so now and then."""
        now = monotonic()
        if self._silent_since is None:
            self._silent_since = self._told = now
        elif now - self._told < TOLD_EVERY:
            return
        self._told = now
        logger.warning(
            "teacher server %s: %s; trying again, for %.0f seconds at most (%.0f so far)",
            self.url,
            reason,
            self.wait,
            now - self._silent_since,
        )

    def answered(self) -> None:
        if self._silent_since is not None:
            seconds = monotonic() - self._silent_since
            logger.warning("teacher server %s: answers again, after %.0f s", self.url, seconds)
            self._silent_since = None


@dataclass(frozen=True)
class Asking:
    """One server, one connection pool."""

    server: TeacherServer
    client: httpx2.AsyncClient

    async def completion(self, body: dict) -> dict:
        """The one choice of `/v1/completions`.

        Args:
            body: Of the request, without the model's name.
        """
        url = f"{self.server.url}/completions"
        answer = await self._post(url, {"model": self.server.model, **body})
        match answer:
            case {"choices": [dict() as choice, *_]}:
                return choice
        raise _no_such_server(url, "its answer has no choices")

    async def prompt_log_probs(self, ids: list[int], k: int) -> list[dict[int, float]]:
        """At each place of a text the log-probabilities of its K likeliest tokens and of the one that stands there,
        nats; nothing at the first.

        Args:
            ids: Of the text.
            k: K, at most the size of the vocabulary.

        Raises:
            UserError: the server gives none, or fewer.
        """
        url = self.server.url
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        try:
            choice = await self.completion(body)
        except Refused as error:
            if error.status != BAD_REQUEST:
                raise
            raise UserError(
                f"{error}. It was asked for {k} prompt_logprobs of {len(ids)} tokens: vLLM gives as many as "
                "--max-logprobs says (20 by default), and --max-model-len must leave room for one token more"
            ) from error
        entries = choice.get("prompt_logprobs")
        if not entries or len(entries) != len(ids):
            raise UserError(
                f"teacher server {url} gives no prompt_logprobs, which this method needs of the teacher; vLLM does, or "
                "take teacher_backend: local"
            )
        found = [
            {int(id): float(entry["logprob"]) for id, entry in (place or {}).items()}
            for place in entries
        ]
        if any(id not in place for id, place in zip(ids[1:], found[1:], strict=True)):
            raise UserError(
                f"teacher server {url}: prompt_logprobs without the prompt's own tokens; its version is not known here"
            )
        fewest = min(map(len, found[1:]), default=k)
        if fewest < k:
            raise UserError(
                f"teacher server {url} gives {fewest} prompt_logprobs where {k} are asked for; start it so that it gives "
                "as many (vLLM: --max-logprobs)"
            )
        return found

    async def _post(self, url: str, body: dict) -> object:
        server, since = self.server, None
        for attempt in itertools.count():
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(attempt, 16))
            try:
                response = await self.client.post(url, json=body)
            except httpx2.TimeoutException:
                reason = f"no answer within {server.timeout:g} seconds (teacher_timeout)"
            except httpx2.RequestError as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
            else:
                content = _content(url, response) if response.is_success else None
                if content is not None and not _aborted(content):
                    server.answered()
                    return content
                reason = f"HTTP {response.status_code}: {_words(response)}"
                if not response.is_success and response.status_code not in RETRIED:
                    raise refusal(server, response)
                pause = max(pause, _retry_after(response))
            now = monotonic()
            since = now if since is None else since
            if now - since >= server.wait:
                raise ServerLost(
                    f"teacher server {server.url}: {reason}; it was tried for {now - since:.0f} seconds "
                    f"(teacher_wait: {server.wait:g}). See that it runs and answers; then continue with --resume, or, if the "
                    "run had not begun, start it again"
                )
            server.silent(reason)
            await asyncio.sleep(min(pause, since + server.wait - now))


async def _first_of(tasks: Sequence[asyncio.Task]) -> set[asyncio.Task]:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return done


async def _closed(client: httpx2.AsyncClient, tasks: Sequence[asyncio.Task]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()


# --- before anything is asked ----------------------------------------------------------------------


def connect(args: TeacherArguments, needed_tokens: int) -> TeacherServer:
    """The server of a recipe, asked for its models.

    A recipe that names the model can do without an answer: what the completion store has needs no server.

    Args:
        needed_tokens: Of the longest prompt with its completion.

    Raises:
        UserError: it cannot be reached, does not serve the model, or serves it with too short a context.
    """
    server = TeacherServer(
        base_url(args.teacher_url),
        args.teacher_name or "",
        args.teacher_timeout,
        args.teacher_wait,
        args.teacher_requests_in_flight,
    )
    try:
        served = _models(server)
    except httpx2.RequestError as error:
        reason = f"teacher server {server.url} cannot be reached ({first_line(error)})"
        if not args.teacher_name:
            raise UserError(
                f"{reason}: start it or correct teacher_url; with teacher_name given, completions that are stored "
                "already need no server"
            ) from error
        logger.warning("warning: %s: only completions that are stored already can be used", reason)
        return server
    if not args.teacher_name and len(served) != 1:
        raise UserError(
            f"teacher server {server.url} serves {', '.join(served) or 'no model'}: set teacher_name to one of them"
        )
    server = replace(server, model=args.teacher_name or next(iter(served)))
    if server.model not in served:
        raise UserError(
            f"teacher_name: {server.url} does not serve {server.model!r}; it serves {', '.join(served)}"
        )
    limit = served[server.model]
    if limit is not None and needed_tokens > limit:
        raise UserError(
            f"max_prompt_tokens + teacher_max_new_tokens is {needed_tokens}, and {server.url} serves {server.model} "
            f"with {limit} tokens at most; lower one of them, or start the server with a longer context"
        )
    return server


def base_url(url: str) -> str:
    """With the version, without a slash at its end."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _models(server: TeacherServer) -> dict[str, int | None]:
    """The models a server has: name → its longest context in tokens, None where the server does not say."""
    url = f"{server.url}/models"
    response = httpx2.get(url, headers=_headers(), timeout=CONNECT_SECONDS)
    if not response.is_success:
        raise refusal(server, response)
    match _content(url, response):
        case {"data": [*models]} if all(isinstance(m, dict) and "id" in m for m in models):
            return {model["id"]: model.get("max_model_len") for model in models}
    raise _no_such_server(url, "its answer lists no models")


def _headers() -> dict[str, str]:
    key = os.environ.get(API_KEY, "")
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{API_KEY} holds characters that no key has; set it again, without blanks")
    return {"Authorization": f"Bearer {key}"}


def check_top_k(server: TeacherServer, k: int) -> None:
    """Whether a server gives so many log-probabilities of a prompt's tokens.

    Raises:
        UserError: it does not.
    """

    async def ask(asking: Asking, ids: list[int]) -> None:
        await asking.prompt_log_probs(ids, k)

    with contextlib.suppress(ServerLost):  # what is needed may be stored already
        list(replace(server, wait=0.0).each(ask, [[0, 0]]))


# --- answers ---------------------------------------------------------------------------------------


def refusal(server: TeacherServer, response: httpx2.Response) -> Refused:
    """What a server will not do, in words."""
    status, words = response.status_code, _words(response)
    if status in (401, 403):  # its words might repeat the key
        what = "refuses the key in" if os.environ.get(API_KEY) else "wants a key, in"
        return Refused(
            f"teacher server {server.url} {what} the environment variable {API_KEY} (HTTP {status})",
            status,
        )
    if status == 404:
        advice = "look at teacher_url and teacher_name"
    elif 300 <= status < 400:
        advice = f"it sends elsewhere ({response.headers.get('location', '?')}); name that address in teacher_url"
    else:
        advice = (
            "prompt and completion must fit what it was started with, and teacher_model must be the model it serves "
            f"as {server.model!r}"
        )
    return Refused(f"teacher server {server.url}: HTTP {status}: {words}; {advice}", status)


def _content(url: str, response: httpx2.Response) -> object:
    try:
        return response.json()
    except ValueError as error:
        raise _no_such_server(url, f"its answer is not JSON: {response.text[:80]!r}") from error


def _aborted(content: object) -> bool:
    """Whether a server that is about to end has left off in the middle of an answer."""
    match content:
        case {"choices": [{"finish_reason": "abort"}, *_]}:
            return True
    return False


def _no_such_server(url: str, why: str) -> UserError:
    return UserError(
        f"teacher server {url}: {why}; teacher_url must be that of an OpenAI-compatible server, such as vLLM"
    )


def _words(response: httpx2.Response) -> str:
    """What the server says, in a line."""
    try:
        content = response.json()
    except ValueError:
        content = response.text
    match content:
        case {"error": {"message": text}} | {"message": text}:
            content = text
    key = os.environ.get(API_KEY)
    text = " ".join((str(content).replace(key, "…") if key else str(content)).split())
    return text[:400] or response.reason_phrase


def _retry_after(response: httpx2.Response) -> float:
    """Seconds the server asks to wait; 0 where it does not say, or says a date."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdigit() else 0.0
