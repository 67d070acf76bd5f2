"""The upload of a run to the model hub: one commit, private unless said otherwise, and looked at afterwards.

What fails for a while (connections, status 5xx) is tried again, what fails for a reason (no login, no right, no such
place) is not. A commit whose answer was lost is recognised by what stands on the hub, and never made twice.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from json import JSONDecodeError
from typing import TypeVar

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from medistill_trl.errors import RunFailed, UserError, first_line
from medistill_trl.hub.files import File, Selection, select
from medistill_trl.run_directory import RunDirectory

logger = logging.getLogger(__name__)

WAITS = (1, 2, 4, 8, 16)  # seconds before each further try
KEPT_BY_THE_HUB = {".gitattributes"}
ADVICE = {
    401: "it does not accept this login; log in with `hf auth login`, with a token that may write",
    402: "it asks for payment; see the account's plan, or push to another --repo_id",
    403: "this login has no right to it; use a token that may write there, or another --repo_id",
    404: "there is no such place for this login; check --repo_id and the token's rights",
    412: "somebody else has committed meanwhile; look at what is there and push again",
    413: "it does not take so much; see the account's limits",
    429: "it was asked too often; wait and push again",
}
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Target:
    """Where a run goes.

    Args:
        repo_id: `owner/name`.
        public: Whether everybody may see it.
        revision: Branch; made if it is not there.
    """

    repo_id: str
    public: bool = False
    revision: str = constants.DEFAULT_REVISION

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise UserError(f"--repo_id: {first_line(error)}") from error
        if "/" not in self.repo_id:
            raise UserError(
                f"--repo_id: must be owner/name, got {self.repo_id!r}; the owner is you or an organisation"
            )
        if not self.revision:
            raise UserError("--revision: is empty; name a branch, or leave it out for main")


@dataclass(frozen=True)
class Pushed:
    """What became of a push.

    Args:
        url: Of the repository at the commit.
        commit: Its hash.
        changed: False if the same files stood there already; nothing was committed then.
        others: Files that were there before and still are.
    """

    url: str
    commit: str
    changed: bool
    others: list[str]


def plan(run: RunDirectory, allow_partial: bool = False) -> Selection:
    """What a push would upload. Asks the hub nothing.

    Raises:
        UserError: see `files.select`.
    """
    return select(run, allow_partial, get_token())


def push(
    run: RunDirectory, selection: Selection, target: Target, endpoint: str | None = None
) -> Pushed:
    """Upload what was selected.

    Args:
        endpoint: Of the hub; HF_ENDPOINT or huggingface.co if not given.

    Raises:
        UserError: the hub refuses it, with what to do.
        RunFailed: the hub cannot be reached, or what stands there is not what was sent.
    """
    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    token = get_token()
    if token is None:
        raise UserError(
            "nobody is logged in; log in with `hf auth login`, with a token that may write"
        )
    api = HfApi(endpoint=endpoint, token=token, library_name="medistill_trl")
    _make_repository(api, target)
    head = _ask("looking at the branch", lambda: _head(api, target))
    additions = [CommitOperationAdd(file.name, file.content) for file in selection.files]
    _send(api, additions, target)
    commit = _commit(
        api, additions, selection.files, target, head, f"Push {run.path.resolve().name}"
    )
    problems, others = _ask(
        "looking at the result", lambda: _compare(api, target, commit, selection.files)
    )
    if problems:
        raise RunFailed(
            f"{target.repo_id} at {commit} is not what was sent: {'; '.join(problems)}. Push again, and look for a "
            ".gitignore there"
        )
    url = f"{api.endpoint}/{target.repo_id}/tree/{commit}"
    return Pushed(url, commit, commit != head, others)


# --- the steps ---------------------------------------------------------------------------------------


def _make_repository(api: HfApi, target: Target) -> None:
    """Make the repository and the branch unless they are there; refuse what would become visible unasked."""
    repo_id = target.repo_id
    _ask(
        f"making {repo_id}",
        lambda: api.create_repo(repo_id, private=not target.public, exist_ok=True),
    )
    is_private = _ask(f"looking at {repo_id}", lambda: api.model_info(repo_id).private)
    if not is_private and not target.public:
        raise UserError(
            f"{repo_id} is there already and everybody can see it; give --public to push to it, or another --repo_id"
        )
    if is_private and target.public:
        logger.warning("%s is private and stays so; its settings page makes it public", repo_id)
    if target.revision != constants.DEFAULT_REVISION:
        _ask(
            f"making the branch {target.revision}",
            lambda: api.create_branch(repo_id, branch=target.revision, exist_ok=True),
        )


def _head(api: HfApi, target: Target) -> str:
    return api.model_info(target.repo_id, revision=target.revision).sha


def _send(api: HfApi, additions: list[CommitOperationAdd], target: Target) -> None:
    """Upload large files, which a commit then only names. It tries again by itself."""
    try:
        _ask(
            "uploading",
            lambda: api.preupload_lfs_files(
                target.repo_id, additions, revision=target.revision, free_memory=False
            ),
            waits=(),
        )
    # RuntimeError: raised from what went wrong with a file. PermissionError: Xet's, of a login that may not write.
    except (RuntimeError, PermissionError) as error:
        raise RunFailed(
            f"uploading: {first_line(error)} ({first_line(error.__cause__ or error)}). Push again later; what has "
            "arrived is not sent again"
        ) from error


def _commit(
    api: HfApi,
    additions: list[CommitOperationAdd],
    files: list[File],
    target: Target,
    head: str,
    message: str,
) -> str:
    """Commit all files at once, on top of `head`; returns the commit's hash."""

    def commit() -> str:
        now = _head(api, target)
        if now == head:
            return api.create_commit(
                target.repo_id,
                additions,
                commit_message=message,
                revision=target.revision,
                parent_commit=head,
            ).oid
        # The hub may commit and yet answer with an error, or its answer gets lost.
        if _compare(api, target, now, files)[0]:
            raise UserError(f"committing to {target.repo_id}: {ADVICE[412]}")
        return now

    try:
        return _ask("committing", commit)
    except ValueError as error:
        raise UserError(f"the hub refuses the card's metadata: {error}") from error


def _compare(
    api: HfApi, target: Target, commit: str, files: list[File]
) -> tuple[list[str], list[str]]:
    """What differs on the hub from what was sent, and which other files are there."""
    entries = api.list_repo_tree(target.repo_id, recursive=True, revision=commit)
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    problems = []
    for file in files:
        entry = there.pop(file.name, None)
        if entry is None:
            problems.append(f"{file.name} is missing")
        elif not _is_same(file, entry):
            problems.append(f"{file.name} has another content")
    return problems, sorted(there.keys() - KEPT_BY_THE_HUB)


def _is_same(file: File, entry: RepoFile) -> bool:
    """Large files are listed with their sha256, others with the name git gives them."""
    with CommitOperationAdd(file.name, file.content).as_file() as content:
        if entry.lfs:
            return hashlib.file_digest(content, "sha256").hexdigest() == entry.lfs.sha256
        data = content.read()
    name = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return name == entry.blob_id


# --- what fails --------------------------------------------------------------------------------------


def _ask(doing: str, call: Callable[[], Answer], waits: Iterable[float] | None = None) -> Answer:
    """Call, and call again where time may help.

    Args:
        doing: For messages.
        waits: Seconds before each further try; by default `WAITS`.
    """
    left = iter(WAITS if waits is None else waits)
    while True:
        try:
            return call()
        except (HTTPError, ConnectionError, TimeoutError, JSONDecodeError) as error:
            problem = _passing_problem(doing, error)
            wait = next(left, None)
            if wait is None:
                raise RunFailed(
                    f"{doing}: {problem}. Push again later; nothing is sent or committed twice"
                ) from error
        logger.warning("%s: %s; trying again in %g s", doing, problem, wait)
        time.sleep(wait)


def _passing_problem(doing: str, error: Exception) -> str:
    """What is wrong at the moment.

    Raises:
        UserError: time does not mend it.
    """
    if isinstance(error, JSONDecodeError):  # a gateway that is down answers with a page
        return "the hub's answer cannot be read"
    if not isinstance(error, HfHubHTTPError):
        return f"the hub cannot be reached ({first_line(error)})"
    status = error.response.status_code
    if status >= 500:
        return f"the hub answers with status {status}"
    said = f" It says: {error.server_message}" if error.server_message else ""
    advice = ADVICE.get(status, "it refuses this")
    raise UserError(f"{doing}: the hub answers with status {status}: {advice}.{said}") from error
