"""Publishing files on the Hugging Face Hub: one commit, checked afterwards.

The token comes from the environment or from `hf auth login`, is never an option and never shown.
Large files go through the Hub's deduplicating storage when `hf_xet` is installed, else (or with
`HF_HUB_DISABLE_XET=1`) over plain HTTP.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from polarctl import console
from polarctl.errors import MissingError, PolarctlError, UsageError
from polarctl.hub.bundle import HubFile
from polarctl.hub.cards import MARK
from polarctl.storage.manifest import sha256

_REPLY_TIMEOUT_S = 300.0
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_repo_id(repo_id: str) -> None:
    """Raise UsageError for what cannot be a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"`{repo_id}`: {_one_line(error)}", hint="`owner/name`") from None


def find_token() -> str:
    """The user's token.

    Raises:
        MissingError: There is none.
    """
    from huggingface_hub import get_token

    with _hub_errors(""):
        token = get_token()
    if not token:
        raise MissingError("no Hugging Face token", hint=_LOGIN)
    return token


def full_name(repo_id: str, token: str) -> str:
    """`owner/name`; the owner of a bare name is the user."""
    if "/" in repo_id:
        return repo_id
    with _hub_errors(repo_id):
        return f"{_api(token).whoami()['name']}/{repo_id}"


def publish(
    items: Mapping[str, HubFile],
    repo_id: str,
    *,
    repo_type: str,
    token: str,
    message: str,
    public: bool = False,
    revision: str | None = None,
    progress: bool = False,
) -> str:
    """Put files into a repository as one commit.

    Args:
        items: The files by name.
        repo_id: `owner/name`; made if it does not exist.
        repo_type: `model` or `dataset`.
        token: A token that may write.
        message: Message of the commit.
        public: Visibility of a new repository; an existing one keeps its own.
        revision: Branch, made if it does not exist; default: main.
        progress: Show huggingface_hub's progress bars.

    Returns:
        The commit's address.

    Raises:
        MissingError: The Hub cannot be reached or does not accept the token.
        PolarctlError: The Hub refuses, or has other files afterwards than it was sent.
    """
    from huggingface_hub import CommitOperationAdd

    api = _api(token, progress)
    with _hub_errors(repo_id), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        url = api.create_repo(repo_id, repo_type=repo_type, private=not public, exist_ok=True)
        before = api.repo_info(repo_id, repo_type=repo_type)
        if before.private is False and not public:
            console.warn(f"{repo_id} is public already: these files will be public too")
        elif before.private and public:
            raise UsageError(
                f"`--public` is for a new repository: {repo_id} is private already",
                hint="leave it out; the Hub's settings make a repository public",
            )
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        if _keeps_card(items, url, revision, token):
            items = {name: item for name, item in items.items() if name != "README.md"}
            console.choice("card", "the Hub's", "the repository has an edited README.md")
        commit = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(item.name, item.source)  # a path, or the bytes themselves
                for item in items.values()
            ],
            commit_message=message,
            repo_type=repo_type,
            revision=revision,
        )
        for warning in said:
            if issubclass(warning.category, UserWarning):  # of README.md's front matter, say
                console.warn(_one_line(warning.message))
        if commit.oid == before.sha:
            console.note(f"{repo_id}: has these files already; nothing to do")
        _verify(api, items, repo_id, repo_type, commit.oid)
    return console.plain(str(commit.commit_url))


def _api(token: str, progress: bool = False) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, get_session, logging

    console.hide(token)
    logging.set_verbosity_error()
    get_session().timeout = _REPLY_TIMEOUT_S  # by default there is no time limit
    if not progress:
        disable_progress_bars()
    return HfApi(token=token, library_name="polarctl")


def _keeps_card(items: Mapping[str, HubFile], url: str, revision: str | None, token: str) -> bool:
    """The repository has a card that a person wrote, and we have a generated one."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    card = items.get("README.md")
    if card is None or not isinstance(card.source, bytes):
        return False
    there = f"{url}/resolve/{quote(revision or 'main', safe='')}/README.md"
    reply = get_session().get(there, headers=build_hf_headers(token=token))
    if reply.status_code == 404:
        return False
    hf_raise_for_status(reply)
    return MARK not in reply.text


def _verify(
    api: Any, items: Mapping[str, HubFile], repo_id: str, repo_type: str, revision: str
) -> None:
    """The repository holds what was sent: a `.gitignore` there, for one, drops files silently."""
    paths = list(items)
    there = {
        info.path: info
        for start in range(0, len(paths), 100)
        for info in api.get_paths_info(
            repo_id, paths[start : start + 100], repo_type=repo_type, revision=revision
        )
    }
    for name, item in items.items():
        info = there.get(name)
        if info is None:
            raise PolarctlError(
                f"{repo_id}: the Hub did not take {name}",
                hint="look for it in the repository's .gitignore",
            )
        if info.size != item.size or _stored_hash(info) != _local_hash(item, info.lfs is not None):
            raise PolarctlError(f"{repo_id}: {name} on the Hub differs from what was sent")


def _stored_hash(info: Any) -> str:
    return str(info.lfs.sha256 if info.lfs is not None else info.blob_id)


def _local_hash(item: HubFile, large: bool) -> str:
    if large and not isinstance(item.source, bytes):
        return sha256(item.source)
    data = item.source if isinstance(item.source, bytes) else item.source.read_bytes()
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # git's name of the content


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into our errors: one line, in clean words."""
    try:
        yield
    except PolarctlError:
        raise
    except Exception as error:
        found = _translate(error, repo_id)
        if found is None:
            raise
        raise found from None


def _translate(error: BaseException, repo_id: str) -> PolarctlError | None:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return UsageError(_one_line(error), hint="mend the lines between `---` in README.md")
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for each in chain:
        if isinstance(each, HfHubHTTPError):
            return _of_status(each, repo_id)
    for each in chain:
        if isinstance(each, OfflineModeIsEnabled):
            return MissingError("the Hub is switched off", hint="unset HF_HUB_OFFLINE")
        if type(each).__module__.partition(".")[0].startswith("httpx"):
            return MissingError(
                f"the Hub cannot be reached: {_one_line(each)}",
                hint="look at the network, and at HF_ENDPOINT if it is set",
            )
    if isinstance(error, TypeError | KeyError | AttributeError | AssertionError):
        return None  # a fault of the program
    hint = "HF_HUB_DISABLE_XET=1 uploads over plain HTTP" if "hf_xet" in sys.modules else None
    return PolarctlError(f"{repo_id}: {_one_line(error)}", hint=hint)


def _of_status(error: Any, repo_id: str) -> PolarctlError:
    status = error.response.status_code
    said = _one_line(error.server_message or error.response.reason_phrase)
    if status == 401:
        return MissingError(f"the Hub does not accept the token: {said}", hint=_LOGIN)
    if status == 403:
        return MissingError(f"{repo_id}: the token may not write there: {said}", hint=_LOGIN)
    return PolarctlError(f"{repo_id}: the Hub answers {status}: {said}")


def _one_line(text: object) -> str:
    return console.plain(str(text)).rstrip(".") or type(text).__name__
