"""A Hub on this machine: the routes that an upload needs, spoken over real HTTP, so that the real client is tested."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "a" * 32


class FakeHub:
    """What was sent to it, to be looked at by a test.

    Attributes:
        url: address of the server.
        repos: {repo id: the JSON it was created with}.
        branches: (repo id, branch) pairs that were created.
        commits: one {"repo", "revision", "message", "files": {path: bytes}} each.
        refuse: {part of a path: HTTP status}, answered instead of doing it.
    """

    def __init__(self):
        self.repos, self.branches, self.commits, self.refuse = {}, [], [], {}
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, object]:
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": f"refused with {status}"}
        if method == "PUT" and path.startswith("/blobs/"):
            oid = path.rsplit("/", 1)[1]
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "content does not match its address"}
            self.blobs[oid] = body
            return 200, {}
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.branches.append(match.groups())
            return 200, {}
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            return self._preupload(json.loads(body))
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            return self._commit(match[1], match[2], body)
        return 404, {"error": f"the fake Hub has no {method} {path}"}

    def _create(self, request):
        repo = f"{request.get('organization') or 'me'}/{request['name']}"
        status = 409 if repo in self.repos else 200
        self.repos.setdefault(repo, request)
        return status, {"url": f"{self.url}/{repo}", "name": repo, "id": repo}

    def _preupload(self, request):
        def mode(path):
            return "lfs" if path.endswith((".safetensors", ".mp4", ".png")) else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in request["files"]]
        return 200, {"files": files}

    def _batch(self, request):
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/blobs/{o['oid']}"}}}
            for o in request["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, repo, revision, body):
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    return 400, {"error": f"{value['path']} was never uploaded"}
                files[value["path"]] = self.blobs[value["oid"]]
        self.commits.append({"repo": repo, "revision": revision, "message": header["summary"], "files": files})
        return 200, {
            "commitUrl": f"{self.url}/{repo}/commit/{len(self.commits):040x}",
            "commitOid": "0" * 40,
            "hookOutput": "",
            "success": True,
        }


def _keep_endpoint(api, endpoint):
    api.__dict__["endpoint"] = endpoint


@contextmanager
def running_hub():
    """A `FakeHub` that listens on 127.0.0.1 until the block ends, and that all Hub clients of this process talk to.
    Libraries keep clients of their own (transformers makes one at its first call), so their class is changed, not one
    of them."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            chunks = []
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
            else:
                chunks.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, content = hub.answer(self.command, self.path.split("?")[0], b"".join(chunks), token)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}.items():
            patch.setenv(name, value)
        flags = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
        for name, value in {"ENDPOINT": hub.url, **flags}.items():
            patch.setattr(constants, name, value)
        patch.setattr(huggingface_hub.HfApi, "endpoint", property(lambda _: hub.url, _keep_endpoint), raising=False)
        huggingface_hub.close_session()  # the next one reads NO_PROXY
        try:
            yield hub
        finally:
            huggingface_hub.close_session()
            server.shutdown()
            server.server_close()
