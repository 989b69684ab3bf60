"""A Hugging Face Hub on this machine: as much of its HTTP protocol as pushing and loading an adapter needs.

    with HubServer() as hub:
        ... a process with hub.environment(cache_folder) in its environment ...
        hub.repos["tester/adapter"].files

It answers what huggingface.co answers: who the token belongs to, making a repository, how each file is to be uploaded
(safetensors as Git LFS, the rest inline), the LFS upload and its check, the commit, and files with their ETags. Only
the user `tester` exists, and only `hub.token` is right. Private repositories are there for that token alone.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit

USER = "tester"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"initial commit").hexdigest()])


class HubServer:
    """Runs in threads from `with` to its end. `requests` keeps "METHOD path" of all that came."""

    def __init__(self):
        self.token = "hf_" + "aSecretThatNobodyMaySee"
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.gone_at: str | None = (
            None  # from the first request whose path matches on, no request is answered
        )
        self.gone = False
        self.silent = False  # take requests and do not answer them
        self.login_page = False  # answer everything with a web page, as the Wi-Fi of a hotel does
        self.repeats_token = False  # a server that is careless with its error messages
        self._end = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, token: str | None = None) -> dict[str, str]:
        """os.environ for a process whose Hub this is. What is set here counts only before huggingface_hub is imported."""
        foreign = ("HF_", "HUGGING", "HUGGINGFACE", "TRANSFORMERS_OFFLINE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return {**kept, **own, **({"HF_TOKEN": token} if token else {})}

    def came_back(self) -> None:
        self.gone_at = None
        self.gone = self.silent = self.login_page = self.repeats_token = False


class _Answer(Exception):
    """Ends a request with this status."""

    def __init__(self, status: int, body=None, **headers: str):
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        self.hub: HubServer = self.server.hub
        self.path_only = unquote(urlsplit(self.path).path)
        if self.hub.silent:
            while self.hub.silent and not self.hub._end.wait(0.05):
                pass
            self._hang_up()  # the server is back, or has ended: nobody waits for ever
            return
        self.data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub._lock:
            self.hub.requests.append(f"{self.command} {self.path_only}")
            if self.hub.gone_at and re.search(self.hub.gone_at, self.path_only):
                self.hub.gone = True
            if self.hub.gone:
                self._hang_up()
                return
            try:
                answer = _Answer(200, b"<html>Welcome</html>") if self.hub.login_page else self._route()
            except _Answer as early:
                answer = early
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _route(self) -> _Answer:
        for methods, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, self.path_only)
            if found and self.command in methods:
                return action(self, *found.groups())
        return _Answer(404, {"error": f"this server has no {self.command} {self.path_only}"})

    def _send(self, answer: _Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        if isinstance(answer.body, dict) and "error" in answer.body:
            self.send_header("X-Error-Message", answer.body["error"])
        for name, value in answer.headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_) -> None:
        pass

    # what a request may do

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _needs_user(self) -> None:
        if not self._known():
            raise _Answer(401, {"error": "Invalid username or password."})

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._known()):
            status = 404 if self._known() else 401
            raise _Answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repo

    def _may_write(self, repo_id: str) -> Repo:
        self._needs_user()
        repo = self._repo(repo_id)
        if not repo_id.startswith(f"{USER}/"):
            raise _Answer(403, {"error": "Forbidden: you may only write to your own repositories"})
        return repo

    def _at(self, repo: Repo, revision: str) -> None:
        if revision not in ("main", *repo.commits):
            raise _Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")

    # the routes

    def whoami(self) -> _Answer:
        self._needs_user()
        return _Answer(200, {"type": "user", "name": USER, "fullname": USER, "orgs": []})

    def create(self) -> _Answer:
        self._needs_user()
        if self.hub.repeats_token:
            raise _Answer(400, {"error": f"no: {self.headers['Authorization']}"})
        wanted = json.loads(self.data)
        owner = wanted.get("organization") or USER
        repo_id = f"{owner}/{wanted['name']}"
        if owner != USER:
            raise _Answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repos[repo_id] = Repo(private)
        return _Answer(200, {"url": url, "name": repo_id, "id": repo_id})

    def validate_yaml(self) -> _Answer:
        """Of all the Hub's rules, the one that adapters run into."""
        content = json.loads(self.data)["content"]
        base = re.search(r"^base_model: *(.*)$", content.split("\n---")[0], re.MULTILINE)
        if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base.group(1).strip("'\"")):
            message = '"base_model" is not valid. Use a model id from the Hub.'
            raise _Answer(400, {"errors": [{"message": message}], "warnings": []})
        return _Answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> _Answer:
        repo = self._may_write(repo_id)
        self._at(repo, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": _blob_id(repo.files[file["path"]]) if file["path"] in repo.files else None,
            }
            for file in json.loads(self.data)["files"]
        ]
        return _Answer(200, {"files": files})

    def lfs_batch(self, repo_id: str) -> _Answer:
        self._may_write(repo_id)
        objects = []
        for wanted in json.loads(self.data)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                upload = f"{self.hub.url}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{upload}/verify"}}
            objects.append(answer)
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> _Answer:
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise _Answer(400, {"error": "the content is not what its name says"})
        self.hub.large_files[oid] = self.data
        return _Answer(200, b"")

    def lfs_verify(self, oid: str) -> _Answer:
        self._needs_user()
        told = json.loads(self.data)
        if told["oid"] != oid or len(self.hub.large_files.get(oid, b"")) != told["size"]:
            raise _Answer(404, {"error": "not uploaded"})
        return _Answer(200, {})

    def commit(self, repo_id: str, revision: str) -> _Answer:
        repo = self._may_write(repo_id)
        self._at(repo, revision)
        files = dict(repo.files)
        for line in self.data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise _Answer(400, {"error": f"{value['path']} points to a file that was never uploaded"})
                files[value["path"]] = self.hub.large_files[value["oid"]]
        repo.files = files
        repo.commits.append(hashlib.sha1(self.data + repo.commits[-1].encode()).hexdigest())
        sha = repo.commits[-1]
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        return _Answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, repo_id: str, revision: str | None = None) -> _Answer:
        repo = self._repo(repo_id)
        self._at(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        about = {
            "_id": repo_id,
            "id": repo_id,
            "modelId": repo_id,
            "private": repo.private,
            "tags": [],
            "downloads": 0,
        }
        return _Answer(200, {**about, "sha": repo.commits[-1], "siblings": siblings, "likes": 0})

    def tree(self, repo_id: str, revision: str) -> _Answer:
        repo = self._repo(repo_id)
        self._at(repo, revision)
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
            for path, data in sorted(repo.files.items())
        ]
        return _Answer(200, entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> _Answer:
        repo = self._repo(repo_id)
        self._at(repo, revision)
        commit = {"X_Repo_Commit": repo.commits[-1]}
        if path not in repo.files:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **commit)
        data = repo.files[path]
        if path.endswith(".safetensors"):
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            commit |= {"X_Linked_ETag": etag, "X_Linked_Size": str(len(data))}
        else:
            etag = f'"{_blob_id(data)}"'
        return _Answer(200, data, ETag=etag, Accept_Ranges="bytes", **commit)


def _blob_id(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{_ID}", _Handler.info),
    ("GET", rf"/api/models/{_ID}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", _Handler.tree),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_put),
    ("POST", r"/lfs/(\w+)/verify", _Handler.lfs_verify),
    (("GET", "HEAD"), rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
