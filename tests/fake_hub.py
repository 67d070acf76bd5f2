"""A model hub on this machine: the few endpoints a push uses, kept in memory, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "T0ken" * 6


@dataclass
class Repository:
    """Branch → commits, each a mapping of path → content. Large files are kept beside, by sha256."""

    private: bool
    branches: dict[str, list[str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        history = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = {**(self.commits[history[-1]] if history else {}), **files}
        history.append(oid)
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]

    def resolve(self, revision: str) -> str:
        return self.branches[revision][-1] if revision in self.branches else revision


@dataclass
class Fault:
    """What a step answers instead, for so many times.

    Args:
        step: Name of a method of `Handler`.
        afterwards: Do what was asked, and answer with the error all the same.
        body: Of the answer; a JSON error if not given.
    """

    step: str
    status: int
    times: int
    afterwards: bool = False
    body: bytes | None = None


class FakeHub:
    """The server's state; the tests look at it.

    Args:
        owners: Who the token may write for.
    """

    def __init__(self, owners=("me", "team")):
        self.owners = set(owners)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: list[Fault] = []
        self.ignored: set[str] = set()  # paths that a .gitignore on the hub leaves out
        self.spoilt: set[str] = set()  # paths of which something else arrives

    def fail(self, step: str, status: int, times: int = 1, **kwargs) -> None:
        self.faults.append(Fault(step, status, times, **kwargs))

    def add(self, repo_id: str, private: bool, files: dict[str, bytes] | None = None) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit("main", {".gitattributes": b"", **(files or {})}, "initial commit")
        return repository

    @contextmanager
    def running(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


REPOSITORY = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/large/(?P<oid>[0-9a-f]+)", "put"),
]


def find_route(verb: str, path: str) -> tuple[str, dict[str, str]] | None:
    for its_verb, pattern, step in ROUTES:
        found = re.fullmatch(pattern, path)
        if verb == its_verb and found:
            words = found.groupdict(default="main")
            return step, {key: unquote(value) for key, value in words.items()}
    return None


class Refused(Exception):
    def __init__(self, status: int, message: str, **content):
        super().__init__(message)
        self.status = status
        self.content = {"error": message, **content}


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_GET

    def _answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = find_route(self.command, urlsplit(self.path).path)
        if found is None:
            self._send(404, {"error": f"no such endpoint: {self.command} {self.path}"})
            return
        step, words = found
        self.hub.asked.append(step)
        fault = next((f for f in self.hub.faults if f.step == step and f.times > 0), None)
        try:
            if fault is None or fault.afterwards:
                self._check_login(step)
                status, content = 200, getattr(self, step)(**words)
            if fault is not None:
                fault.times -= 1
                status, content = fault.status, fault.body or {"error": "out of order"}
        except Refused as refusal:
            status, content = refusal.status, refusal.content
        self._send(status, content)

    def _send(self, status, content):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "text/html" if isinstance(content, bytes) else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _check_login(self, step):
        if step != "put" and self.headers.get("authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Invalid credentials in Authorization header")

    def _repository(self, repo_id) -> Repository:
        if repo_id not in self.hub.repositories:
            raise Refused(404, "Repository not found")
        return self.hub.repositories[repo_id]

    # --- endpoints

    def create(self):
        asked = json.loads(self.body)
        owner = asked["organization"]
        if owner not in self.hub.owners:
            raise Refused(403, f"you may not create a model under {owner}")
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.hub.repositories:
            url = f"{self.hub.endpoint}/{repo_id}"
            raise Refused(409, "You already created this model repo", url=url)
        self.hub.add(repo_id, private=asked.get("visibility") == "private")
        return {"url": f"{self.hub.endpoint}/{repo_id}"}

    def info(self, repo_id, revision):
        repository = self._repository(repo_id)
        return {
            "id": repo_id,
            "sha": repository.resolve(revision),
            "private": repository.private,
            "siblings": [],
        }

    def branch(self, repo_id, branch):
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise Refused(409, "the branch exists")
        repository.branches[branch] = list(repository.branches["main"])
        return {}

    def validate(self):
        if "license: nonsense" in json.loads(self.body)["content"]:
            raise Refused(400, "license must be one of")
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id, revision):
        there = self._repository(repo_id).files(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": file["path"] in self.hub.ignored,
                    "oid": blob_name(file["path"], there[file["path"]])
                    if file["path"] in there
                    else None,
                }
                for file in json.loads(self.body)["files"]
            ]
        }

    def batch(self, repo_id):
        self._repository(repo_id)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large:
                href = f"{self.hub.endpoint}/large/{item['oid']}"
                item["actions"] = {"upload": {"href": href}}
        return {"transfer": "basic", "objects": objects}

    def put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        return {}

    def commit(self, repo_id, revision):
        repository = self._repository(repo_id)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.resolve(revision)):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise Refused(400, f"unexpected {line['key']}")
        files |= {path: b"something else" for path in files.keys() & self.hub.spoilt}
        oid = repository.commit(revision, files, header["summary"])
        return {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid}

    def tree(self, repo_id, revision):
        return [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": git_name(content),
                **({"lfs": large(content)} if is_large(path) else {}),
            }
            for path, content in self._repository(repo_id).files(revision).items()
        ]


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".model"))


def git_name(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def blob_name(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_large(path) else git_name(content)


def large(content: bytes) -> dict:
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
