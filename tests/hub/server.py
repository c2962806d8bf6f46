"""A server that speaks the Hub's protocol, on the loopback interface: enough to upload to and to download from.

Repositories, `preupload`, commits, LFS (batch, upload, verify), `resolve` and `whoami`, as `huggingface_hub` calls
them. Files above `LFS_BYTES`, and all safetensors, go by LFS, or by Xet from a client that has it: it gets a token,
uploads chunks of the files, uncompressed if it is told so, and what they make up (version 1 of that protocol).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_aTokenThatMayWrite0123456789abcdef"
LFS_BYTES = 1 << 20


class Repo:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = []  # summary, files

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1] if self.commits else {}

    @property
    def head(self) -> str:
        return self.commit_id(len(self.commits))

    @staticmethod
    def commit_id(count: int) -> str:
        """Of the last of so many commits."""
        return hashlib.sha1(f"{count}".encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Id and files of a commit, or of the main branch's last; `None` if there is no such revision."""
        if revision in ("main", self.head):
            return self.head, self.files
        earlier = {self.commit_id(count): files for count, (_, files) in enumerate(self.commits, start=1)}
        return (revision, earlier[revision]) if revision in earlier else None


class Hub(ThreadingHTTPServer):
    """The server, in a thread of its own: `with Hub() as hub: hub.url`.

    `trouble` is called with the method and the path of each request. It may return an HTTP status to answer with,
    "drop" to close the connection in mid-request, or "stall" to answer nothing, and to close it once `release` is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.chunks: list[bytes] = []  # by Xet, in the order of their files
        self.requests: list[tuple[str, str]] = []
        self.trouble: Any = lambda method, path: None
        self.release = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content_Length", str(len(data))))
        self.send_header("Content-Type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        trouble = self.server.trouble(self.command, path)
        length = int(self.headers.get("Content-Length", 0))
        if trouble == "drop":  # after half of the body has been taken
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        if trouble == "stall":
            self.server.release.wait()
            self.close_connection = True
            return
        body = self.body()
        if trouble is not None:
            self.answer(trouble, {"error": "The server has a bad day."})
            return
        with self.server.lock:
            for pattern, method in ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    method(self, body, **found.groupdict())
                    return
        self.answer(404, {"error": "Not found"})

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def refuse(self) -> None:
        self.answer(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password.")

    def found(self, repo: str) -> Repo | None:
        """The repository, if the one who asks may know of it."""
        there = self.server.repos.get(repo)
        if there is None or (there.private and not self.authorised):
            self.answer(
                404 if self.authorised else 401,
                {"error": "Repository not found"},
                X_Error_Code="RepoNotFound",
                X_Error_Message="Repository not found",
            )
            return None
        return there

    # --- what is asked ----------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        if not self.authorised:
            return self.refuse()
        self.answer(200, {"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        if not self.authorised:
            return self.refuse()
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = f"{self.server.url}/{repo}"
        if repo in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        self.server.repos[repo] = Repo(asked.get("private", False) or asked.get("visibility") == "private")
        self.answer(200, {"url": url, "name": repo})

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        metadata = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = [] if metadata else [{"message": "no metadata"}]
        values = yaml.safe_load(metadata[1]) if metadata else {}
        for key, kind in (("tags", list), ("library_name", str), ("base_model", str), ("model-index", list)):
            if key in values and not isinstance(values[key], kind):
                errors.append({"message": f"{key} must be a {kind.__name__}"})
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        if self.found(repo) is None:
            return
        if not self.authorised:
            return self.refuse()
        modes = []
        for file in json.loads(body)["files"]:
            lfs = file["size"] > LFS_BYTES or file["path"].endswith(".safetensors")
            modes.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
        self.answer(200, {"files": modes})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            oid = asked["oid"]
            one: dict[str, Any] = {"oid": oid, "size": asked["size"]}
            if oid not in self.server.objects:
                upload = {"href": f"{self.server.url}/lfs/{oid}"}
                one["actions"] = {"upload": upload, "verify": {"href": f"{self.server.url}/{repo}.git/verify"}}
            objects.append(one)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "not what was announced"})
        self.server.objects[oid] = body
        self.answer(200)

    def lfs_verify(self, body: bytes, repo: str) -> None:
        asked = json.loads(body)
        there = self.server.objects.get(asked["oid"])
        self.answer(200 if there is not None and len(there) == asked["size"] else 404, {})

    def xet_token(self, body: bytes, repo: str) -> None:
        if not self.authorised:
            return self.refuse()
        self.answer(200, {"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": f"{self.server.url}/xet"})

    def xet_xorb(self, body: bytes) -> None:
        while body[:1] == b"\0":  # the header of a chunk: version, its bytes here, compression, its bytes
            here, compression = int.from_bytes(body[1:4], "little"), body[4]
            assert compression == 0
            self.server.chunks.append(body[8 : 8 + here])
            body = body[8 + here :]
        self.answer(200, {"was_inserted": True})

    def xet_shard(self, body: bytes) -> None:
        self.answer(200, {"result": 1})

    def xet_object(self, oid: str) -> None:
        """Find a file among the chunks."""
        chunks = self.server.chunks
        for start in range(len(chunks)):
            digest = hashlib.sha256()
            for end in range(start, len(chunks)):
                digest.update(chunks[end])
                if digest.hexdigest() == oid:
                    self.server.objects[oid] = b"".join(chunks[start : end + 1])
                    return

    def commit(self, body: bytes, repo: str) -> None:
        there = self.found(repo)
        if there is None:
            return
        if not self.authorised:
            return self.refuse()
        files, summary = dict(there.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
                if value.get("parentCommit", there.head) != there.head:
                    return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    self.xet_object(value["oid"])
                if value["oid"] not in self.server.objects:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.server.objects[value["oid"]]
        there.commits.append((summary, files))
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{there.head}", "commitOid": there.head})

    def info(self, body: bytes, repo: str) -> None:
        if there := self.found(repo):
            siblings = [{"rfilename": name} for name in there.files]
            values = {"id": repo, "modelId": repo, "sha": there.head, "private": there.private, "siblings": siblings}
            self.answer(200, values)

    def tree(self, body: bytes, repo: str) -> None:
        if there := self.found(repo):
            files = there.files.items()
            self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files
                ],
            )

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        there = self.found(repo)
        if there is None:
            return
        if (found := there.at(revision)) is None:
            return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        commit, files = found
        if file not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        data = files[file]
        etag = hashlib.sha256(data).hexdigest()
        self.answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=commit, Accept_Ranges="bytes")


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = (
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{REPO}/preupload/main", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/main", Handler.commit),
    (rf"GET /api/models/{REPO}(/revision/main)?", Handler.info),
    (rf"GET /api/models/{REPO}/tree/[\w.-]+", Handler.tree),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (rf"POST /{REPO}\.git/verify", Handler.lfs_verify),
    (rf"GET /api/models/{REPO}/xet-write-token/main", Handler.xet_token),
    (r"POST /xet/v1/xorbs/default/[0-9a-f]{64}", Handler.xet_xorb),
    (r"POST /xet/v1/shards", Handler.xet_shard),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[\w.-]+)/(?P<file>.+)", Handler.resolve),
)
