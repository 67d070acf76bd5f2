"""The client of a completion server: order, back-pressure, retries, and words for what goes wrong."""

import asyncio
import logging
import random
import time

import pytest
from completion_server import Server, serving

from medistill_trl import recipe_rules, teacher_server
from medistill_trl.arguments import TeacherArguments
from medistill_trl.errors import UserError
from medistill_trl.teacher_server import API_KEY, ServerLost, TeacherServer, connect

KEY = "k3y-" + "Pl4nted" * 4


def echo(body):
    """Answers with the request's number, in its own time."""
    time.sleep(body.get("pause", 0.0))
    return 200, {"choices": [{"text": str(body["number"]), "finish_reason": "length"}]}


@pytest.fixture
def server():
    with serving(echo) as server:
        yield server


def client(server: Server, **changes) -> TeacherServer:
    settings = {"timeout": 5.0, "wait": 5.0, "in_flight": 4, **changes}
    return TeacherServer(server.url, "tiny", **settings)


def ask_all(asked: TeacherServer, bodies: list[dict]) -> dict[int, str]:
    async def ask(asking, body):
        return (await asking.completion(body))["text"]

    return dict(entry for part in asked.each(ask, bodies) for entry in part)


def numbers(count: int, **more) -> list[dict]:
    return [{"number": n, **more} for n in range(count)]


def test_every_answer_is_that_of_its_question_however_late_it_comes(server):
    bodies = [{"number": n, "pause": random.Random(n).uniform(0, 0.05)} for n in range(30)]
    assert ask_all(client(server), bodies) == {n: str(n) for n in range(30)}


@pytest.mark.parametrize("in_flight", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(server, in_flight):
    ask_all(client(server, in_flight=in_flight), numbers(12, pause=0.01))
    assert server.most == in_flight


def test_no_more_questions_are_begun_than_allowed(server):
    """Without HTTP, whose pool of connections would hold back the rest."""
    under_way, most = 0, 0

    async def ask(asking, number):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001 * (number % 5))
        under_way -= 1

    for _ in client(server, in_flight=3).each(ask, range(20)):
        pass
    assert most == 3


def test_nothing_is_asked_ahead_of_who_takes_the_answers(server):
    async def ask(asking, body):
        return await asking.completion(body)

    answers = client(server, in_flight=2).each(ask, numbers(20))
    next(answers)
    time.sleep(0.2)
    answers.close()
    time.sleep(0.1)
    assert len(server.asked) <= 4


@pytest.mark.parametrize("fault", [429, 408, 500, 503, "drop", "abort"])
def test_what_passes_is_tried_again_and_nothing_is_lost(server, monkeypatch, fault):
    monkeypatch.setattr(teacher_server, "FIRST_PAUSE", 0.01)
    server.faults = [fault] * 5
    assert ask_all(client(server), numbers(6)) == {n: str(n) for n in range(6)}


def test_a_slow_answer_is_asked_for_again(server, monkeypatch):
    monkeypatch.setattr(teacher_server, "FIRST_PAUSE", 0.01)
    server.faults = [1.0]
    start = time.monotonic()
    assert ask_all(client(server, timeout=0.2), numbers(1)) == {0: "0"}
    assert time.monotonic() - start < 0.9


def test_pauses_double_and_heed_what_the_server_asks_for(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    with serving(echo) as server:
        server.faults = [500] * 8
        monkeypatch.setattr(teacher_server.asyncio, "sleep", sleep)
        ask_all(client(server, wait=1000), numbers(1))
    assert slept == [0.5, 1, 2, 4, 8, 16, 30, 30]
    response = teacher_server.httpx2.Response(429, headers={"Retry-After": "7"})
    assert teacher_server._retry_after(response) == 7


def test_a_server_that_stays_away_ends_the_run_in_words(server, caplog):
    server.die()
    start = time.monotonic()
    with pytest.raises(ServerLost) as caught:
        ask_all(client(server, wait=1.0), numbers(3))
    assert 0.9 < time.monotonic() - start < 3
    for part in (server.url, "tried for 1 seconds", "teacher_wait: 1", "--resume", "ConnectError"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 1
    told = [r.message for r in caplog.records if "trying again, for 1 seconds" in r.message]
    assert len(told) == 1  # not one for each request


def test_a_server_that_comes_back_within_the_wait_is_asked_on(server, monkeypatch, caplog):
    monkeypatch.setattr(teacher_server, "FIRST_PAUSE", 0.1)
    port = server.server_address[1]
    server.answers_left = 3
    answers = client(server, wait=20.0)

    async def ask(asking, body):
        return (await asking.completion(body))["text"]

    found = {}
    with caplog.at_level(logging.WARNING):
        for part in answers.each(ask, numbers(10)):
            found |= dict(part)
            if len(found) == 3:
                server.die()
                server = Server(echo, port=port)
    server.die()
    assert found == {n: str(n) for n in range(10)}


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (400, "maximum context length is 512", "HTTP 400: maximum context length is 512; prompt"),
        (422, "no such field", "HTTP 422: no such field"),
        (307, "", "it sends elsewhere"),
        (501, "not here", "HTTP 501: not here"),
    ],
)
def test_what_the_server_refuses_is_an_error_at_once(status, message, expected):
    with serving(lambda body: (status, {"error": {"message": message}})) as server:
        with pytest.raises(UserError, match=expected):
            ask_all(client(server), numbers(3))
        assert len(server.asked) <= 3


def test_an_unknown_model_and_another_kind_of_server_are_named(server):
    asked = client(server)
    asked.model = "large"
    with pytest.raises(UserError, match=r"404: The model `large` does not exist.*teacher_name"):
        ask_all(asked, numbers(1))
    server.faults = ["text"]
    with pytest.raises(UserError, match=r"not JSON.*teacher_url must be"):
        ask_all(client(server), numbers(1))


# --- the key ---------------------------------------------------------------------------------------


def test_the_key_reaches_the_server_and_nothing_else(monkeypatch, caplog, capsys):
    monkeypatch.setenv(API_KEY, KEY)
    with caplog.at_level(logging.DEBUG), serving(echo, key=KEY) as server:
        assert ask_all(client(server), numbers(2)) == {0: "0", 1: "1"}
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        server.key = "another"
        with pytest.raises(UserError, match=f"refuses the key in .*{API_KEY}") as refused:
            ask_all(client(server), numbers(1))
        server.answer, server.key = (lambda body: (400, {"message": f"{KEY}?"})), None
        with pytest.raises(UserError, match="HTTP 400: …") as echoed:
            ask_all(client(server), numbers(1))
        monkeypatch.delenv(API_KEY)
        server.key = KEY
        with pytest.raises(UserError, match=f"wants a key, in .*{API_KEY}"):
            ask_all(client(server), numbers(1))
    texts = [str(refused.value), str(echoed.value), repr(client(server)), *capsys.readouterr()]
    texts += [record.getMessage() for record in caplog.records]
    assert not any(KEY in text for text in texts)


def test_a_key_that_is_none_is_refused_without_being_shown(server, monkeypatch):
    monkeypatch.setenv(API_KEY, f"{KEY} {KEY}")
    with pytest.raises(UserError, match="holds characters that no key has") as caught:
        ask_all(client(server), numbers(1))
    assert KEY not in str(caught.value)


# --- before a run ----------------------------------------------------------------------------------


def arguments(server, **changes) -> TeacherArguments:
    url = server.url.removesuffix("/v1") + "/"
    return TeacherArguments("t", teacher_backend="server", teacher_url=url, **changes)


def test_the_one_model_of_a_server_needs_no_name(server):
    found = connect(arguments(server), 100)
    assert (found.url, found.model) == (server.url, "tiny")


def test_a_model_that_is_not_served_or_too_short_is_refused_before_anything_is_asked(server):
    with pytest.raises(UserError, match=r"does not serve 'large'; it serves tiny"):
        connect(arguments(server, teacher_name="large"), 100)
    server.models = {"a": 64, "b": None}
    with pytest.raises(UserError, match="serves a, b: set teacher_name"):
        connect(arguments(server), 100)
    with pytest.raises(UserError, match=r"is 65, and .* serves a with 64 tokens at most"):
        connect(arguments(server, teacher_name="a"), 65)
    assert connect(arguments(server, teacher_name="a"), 64).model == "a"
    assert server.asked == []


def test_without_a_server_only_a_named_model_goes_on(server, caplog):
    server.die()
    with pytest.raises(UserError, match=r"cannot be reached .*start it or correct teacher_url"):
        connect(arguments(server), 100)
    assert connect(arguments(server, teacher_name="tiny"), 100).model == "tiny"
    assert "only completions that are stored already" in caplog.text


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"teacher_backend": "server"}, "teacher_url"),
        ({"teacher_backend": "server", "teacher_url": "127.0.0.1:8000"}, "teacher_url"),
        ({"teacher_backend": "server", "teacher_url": "http://h:1/v1?key=x"}, "teacher_url"),
        ({"teacher_backend": "server", "teacher_url": "http://ann@h:1/v1"}, "teacher_url"),
    ],
)
def test_a_recipe_with_a_wrong_address_is_refused(values, key):
    assert [found for found, _ in recipe_rules.conflicts(values)] == [key]


def test_settings_that_a_server_ignores_are_said():
    values = {
        "teacher_backend": "server",
        "teacher_url": "http://h:1",
        "teacher_load_in_4bit": True,
    }
    assert list(recipe_rules.conflicts(values)) == []
    assert [key for key, _ in recipe_rules.cautions(values)] == ["teacher_load_in_4bit"]
    assert [key for key, _ in recipe_rules.cautions({"teacher_url": "http://h:1"})] == [
        "teacher_url"
    ]
