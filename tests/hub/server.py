"""
A Hub of our own on 127.0.0.1: as much of its protocol as huggingface_hub and datasets speak for pushing and loading.

Repositories are lists of commits, each a map of paths to content hashes; contents are bytes in memory. Clients find it
by `HubServer.environment()`, set before they import huggingface_hub.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".parquet", ".safetensors", ".png")
REPO, REV = r"(?P<id>[\w.-]+/[\w.-]+)", r"(?P<rev>refs/pr/1|[^/]+)"


class HubServer:
    """Use as a context manager; `commits` and `requests` tell a test what happened."""

    def __init__(self):
        self.contents: dict[str, bytes] = {}
        self.commits: dict[tuple[str, str], list[dict[str, str]]] = {}
        self.requests: list[tuple[str, str]] = []
        self.private: set[tuple[str, str]] = set()
        self.converted: set[tuple[str, str]] = set()  # their last commit is the pull request of the Hub's service
        self.uploads_left = float("inf")
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home) -> dict[str, str]:
        """Variables that send a client process here, with caches of its own in the folder `home`."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
        return own | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def files(self, repo_id: str, kind: str = "dataset") -> dict[str, bytes]:
        """The repository's files as of the last commit."""
        return {path: self.contents[oid] for path, oid in self.commits[kind, repo_id][-1].items()}

    def uploads(self) -> int:
        """How many large files came in so far."""
        return sum(method == "PUT" for method, _ in self.requests)


def commit_id(number: int) -> str:
    return f"{number:040x}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    # Method, path, and the function that answers; groups of the path are its arguments.
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", rf"/api/(?P<kind>\w+)s/{REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", rf"/api/(?P<kind>\w+)s/{REPO}/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", rf"/api/(?P<kind>\w+)s/{REPO}/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("GET", rf"/api/(?P<kind>\w+)s/{REPO}/tree/(?P<rev>[^/]+)(?P<folder>/.*)?", "tree"),
        ("GET", rf"/api/(?P<kind>\w+)s/{REPO}/commits/{REV}", "history"),
        ("GET", rf"/api/(?P<kind>\w+)s/{REPO}/discussions", "discussions"),
        ("GET", rf"/api/(?P<kind>\w+)s/{REPO}(/revision/{REV})?", "info"),
        ("POST", rf"/(datasets/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("HEAD|GET", rf"/(?P<prefix>datasets/)?{REPO}/resolve/{REV}/(?P<path>.+)", "resolve"),
        ("POST", rf"/test/converted/{REPO}", "convert"),
        ("POST", r"/test/uploads-left/(?P<count>\d+|inf)", "limit_uploads"),
    ]

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                return getattr(self, name)(**match.groupdict())
        self.fail(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args) -> None:
        pass

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status, Content_Type="application/json")

    def fail(self, status: int, code: str) -> None:
        self.send(json.dumps({"error": code}).encode(), status, Content_Type="application/json", X_Error_Code=code)

    def whoami(self) -> None:
        self.send_json({"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        kind = asked.get("type") or "model"
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}", "id": repo_id}
        exists = (kind, repo_id) in self.hub.commits
        if not exists:
            self.hub.commits[kind, repo_id] = [{}]
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add((kind, repo_id))
        self.send_json(answer, 409 if exists else 200)

    def preupload(self, kind: str, id: str, rev: str) -> None:
        files = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in files]
        answer = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(files, modes, strict=True)]
        self.send_json({"files": answer})

    def lfs_batch(self, id: str) -> None:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.contents:
                upload = {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def limit_uploads(self, count: str) -> None:
        """For tests, not of the protocol: connections break off after so many more large files."""
        self.hub.uploads_left = float(count)
        self.send(b"")

    def lfs_put(self, oid: str) -> None:
        self.hub.uploads_left -= 1
        if self.hub.uploads_left < 0:
            self.close_connection = True
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "BadRequest")
        self.hub.contents[oid] = self.body
        self.send(b"")

    def lfs_verify(self) -> None:
        self.send_json({}, 200 if json.loads(self.body)["oid"] in self.hub.contents else 404)

    def commit(self, kind: str, id: str, rev: str) -> None:
        files = dict(self.hub.commits[kind, id][-1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "lfsFile":
                files[value["path"]] = value["oid"]
            elif entry["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = hashlib.sha256(content).hexdigest()
                self.hub.contents[files[value["path"]]] = content
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commits = self.hub.commits[kind, id]
        commits.append(files)
        oid = commit_id(len(commits) - 1)
        self.send_json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{id}/commit/{oid}"})

    def at(self, kind: str, repo_id: str, rev: str | None) -> tuple[str, dict[str, str]] | None:
        """A commit's id and files; None, and an error sent, where there is none."""
        commits = self.hub.commits.get((kind, repo_id))
        hidden = (kind, repo_id) in self.hub.private and "Authorization" not in self.headers
        if commits is None or hidden:
            return self.fail(401, "RepoNotFound")  # as the Hub answers, so that nobody learns which it is
        last = len(commits) - 1
        main = last - ((kind, repo_id) in self.hub.converted)
        number = {None: main, "main": main, "refs/heads/main": main, "refs/pr/1": last}.get(rev, -1)
        number = int(rev, 16) if number < 0 and re.fullmatch("[0-9a-f]{40}", rev) else number
        if not 0 <= number < len(commits):
            return self.fail(404, "RevisionNotFound")
        return commit_id(number), commits[number]

    def info(self, kind: str, id: str, rev: str | None) -> None:
        if found := self.at(kind, id, rev):
            sha, files = found
            about = {"_id": "0", "id": id, "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self.send_json(about | {"siblings": [{"rfilename": path} for path in sorted(files)]})

    def history(self, kind: str, id: str, rev: str) -> None:
        if found := self.at(kind, id, rev):
            numbers = range(int(found[0], 16), -1, -1)
            about = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "", "message": ""}
            self.send_json([about | {"id": commit_id(number)} for number in numbers])

    def discussions(self, kind: str, id: str) -> None:
        opened = {
            "title": "Adding `safetensors` variant of this model",
            "num": 1,
            "author": {"name": "SFconvertbot"},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": "open",
            "repo": {"name": id, "type": kind},
            "isPullRequest": True,
        }
        found = [opened] if (kind, id) in self.hub.converted else []
        self.send_json({"discussions": found, "count": len(found), "start": 0})

    def convert(self, id: str) -> None:
        """For tests, not of the protocol: the last commit becomes a pull request."""
        self.hub.converted.add(("model", id))
        self.send(b"")

    def entry(self, path: str, oid: str) -> dict:
        size = len(self.hub.contents[oid])
        entry = {"type": "file", "path": path, "oid": oid[:40], "size": size}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 130}
        return entry

    def entries(self, files: dict[str, str]) -> dict[str, dict]:
        """Files and the folders that they lie in, by path."""
        entries = {path: self.entry(path, oid) for path, oid in files.items()}
        for path in files:
            while path := path.rpartition("/")[0]:
                entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        return dict(sorted(entries.items()))

    def tree(self, kind: str, id: str, rev: str, folder: str | None) -> None:
        if found := self.at(kind, id, rev):
            start = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
            inside = [entry for path, entry in self.entries(found[1]).items() if path.startswith(start)]
            if start and not inside:
                return self.fail(404, "EntryNotFound")
            if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
                inside = [entry for entry in inside if "/" not in entry["path"][len(start) :]]
            self.send_json(inside)

    def paths_info(self, kind: str, id: str, rev: str) -> None:
        if found := self.at(kind, id, rev):
            text = self.body.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            entries = self.entries(found[1])
            paths = [asked] if isinstance(asked, str) else asked
            self.send_json([entries[path.strip("/")] for path in paths if path.strip("/") in entries])

    def resolve(self, prefix: str | None, id: str, rev: str, path: str) -> None:
        if found := self.at("dataset" if prefix else "model", id, rev):
            sha, files = found
            if path not in files:
                return self.fail(404, "EntryNotFound")
            content = self.hub.contents[files[path]]
            headers = {"ETag": f'"{files[path]}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if span is None:
                return self.send(content, **headers)
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self.send(content[first : last + 1], 206, **headers)
