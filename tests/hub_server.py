"""A small server that answers Hugging Face's client, from memory: create, upload, list, download."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """One branch, main, and one commit."""

    repos: dict[str, dict[str, bytes]]  # files of each repository
    requests: list[str]

    def log_message(self, *_):
        pass

    def answer(self, value, status=200, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (("Content-Length", str(len(data))), *headers):
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code):
        self.answer({"error": code}, 404, [("X-Error-Code", code), ("X-Error-Message", code)])

    def do_GET(self):
        path = urlsplit(self.path).path
        self.requests.append(f"{self.command} {path}")
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (listing or file):
            return self.answer({}, 404)
        repo_id, revision = (listing[1], listing[3] or "main") if listing else (file[1], file[2])
        files = self.repos.get(repo_id)
        if files is None:
            return self.refuse("RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse("RevisionNotFound")
        if listing and listing[2] == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.answer(rows)
        if listing:
            return self.answer({"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]})
        data = files[file[3]]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self.answer(data, headers=[("ETag", etag), ("X-Repo-Commit", COMMIT)])

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted['organization']}/{wanted['name']}"
            self.repos.setdefault(repo_id, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{repo_id}", "name": repo_id})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo_id, action = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path
        ).groups()
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            ways = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer({"files": ways})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repos[repo_id][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{COMMIT}"
        return self.answer({"commitUrl": url, "commitOid": COMMIT})


def start() -> ThreadingHTTPServer:
    """A server on a free port; its handler class has `repos` and `requests`."""
    handler = type("Hub", (Handler,), {"repos": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
