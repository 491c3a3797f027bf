"""A small Hub on 127.0.0.1: the part of its HTTP interface that an upload speaks, with what it was told in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, TOKEN = "ada", "hf_" + "S3cretCanary" * 3


@dataclass
class Hub:
    """repos: name -> {path: content}; commits: how many were made; private: of each repository.

    breaks: the kind of request, `upload` or `commit`, that is refused so many times.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    uploads: list[str] = field(default_factory=list)
    commits: int = 0
    breaks: dict[str, int] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def refuses(self, kind: str) -> bool:
        self.breaks[kind] = self.breaks.get(kind, 0) - 1
        return self.breaks[kind] >= 0

    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._route("GET")

    def do_POST(self):
        self._route("POST")

    def do_PUT(self):
        self._route("PUT")

    def _route(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.hub.seen.append(f"{method} {path}")
        if path.startswith("/store/"):  # signed by its address, as on the Hub
            return self._store(path.removeprefix("/store/"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        for pattern, answer in (
            (r"GET /api/whoami-v2", self._whoami),
            (r"POST /api/validate-yaml", lambda: {"errors": [], "warnings": []}),
            (r"POST /api/repos/create", self._create),
            (r"POST /api/models/(.+)/preupload/main", self._preupload),
            (r"POST /(.+)\.git/info/lfs/objects/batch", self._batch),
            (r"POST /api/models/(.+)/commit/main", self._commit),
            (r"GET /api/models/(.+)/revision/main", self._info),
        ):
            if found := re.fullmatch(pattern, f"{method} {path}"):
                return self._answer(*_with_status(answer(*found.groups())))
        return self._answer({"error": f"no such address {path}"}, 404)

    def _answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _whoami(self):
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}

    def _create(self):
        told = json.loads(self.body)
        name = f"{told['organization'] or USER}/{told['name']}"
        if not name.startswith(f"{USER}/"):
            return {"error": "You don't have the rights to create a model there"}, 403
        if name in self.hub.repos:
            return {
                "error": "You already created this model repo",
                "url": f"{self.hub.url}/{name}",
            }, 409
        self.hub.repos[name] = {".gitattributes": b"*.safetensors filter=lfs"}
        self.hub.private[name] = told.get("visibility") == "private" or told.get("private", False)
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def _preupload(self, repo: str):
        files = []
        for told in json.loads(self.body)["files"]:
            large = told["path"].endswith((".safetensors", ".png"))
            there = self.hub.repos[repo].get(told["path"])
            mark = (
                (hashlib.sha256(there).hexdigest() if large else _git_sha(there))
                if there is not None
                else None
            )
            mode = "lfs" if large else "regular"
            files.append(
                {"path": told["path"], "uploadMode": mode, "shouldIgnore": False, "oid": mark}
            )
        return {"files": files}

    def _batch(self, repo: str):
        assert repo in self.hub.repos
        objects = []
        for told in json.loads(self.body)["objects"]:
            if told["oid"] not in self.hub.store:
                told["actions"] = {"upload": {"href": f"{self.hub.url}/store/{told['oid']}"}}
            objects.append(told)
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str) -> None:
        if self.hub.refuses("upload"):
            return self._answer({"error": "the store is full"}, 507)
        assert hashlib.sha256(self.body).hexdigest() == oid
        assert "Authorization" not in self.headers
        self.hub.store[oid] = self.body
        self.hub.uploads.append(oid)
        return self._answer({})

    def _commit(self, repo: str):
        if self.hub.refuses("commit"):
            return {"error": "Internal error"}, 500
        for line in self.body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.store[value["oid"]]
            else:
                assert told["key"] == "header"
        self.hub.commits += 1
        sha = self.hub.sha()
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}",
        }

    def _info(self, repo: str):
        names = [{"rfilename": name} for name in self.hub.repos[repo]]
        return {"id": repo, "modelId": repo, "sha": self.hub.sha(), "siblings": names, "tags": []}


def _with_status(answer):
    return answer if isinstance(answer, tuple) else (answer, 200)


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
