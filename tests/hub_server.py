"""A Hub on this machine, in memory: as much of the protocol as huggingface_hub and transformers speak to push and load.

What it knows of the real one: commits are whole or not at all, weights travel as LFS objects, private repositories do
not exist for others, and errors carry X-Error-Code.
"""

import base64
import hashlib
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

USERS = {"hf_ann": "ann", "hf_bob": "bob"}  # token -> name, which is also the only namespace that it may write to


@dataclass
class Repository:
    """Its commits are snapshots, path -> content, by their ids; `refs` holds branches and tags."""

    name: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid], self.refs[branch] = files, oid
        return oid


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256

    # Who asks, and for what

    def user(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise error(401, "InvalidToken", "Invalid user token.")
        return USERS.get(token)

    def repository(self, request: Request, write: bool = False) -> Repository:
        owner, user = request.path_params["owner"], self.user(request)
        found = self.repositories.get(f"{owner}/{request.path_params['name']}")
        if found is None or (found.private and user != owner):
            raise error(404 if user else 401, "RepoNotFound", "Repository not found.")
        if write and user != owner:
            raise error(403, "Forbidden", f"{user} may not write to {found.name}.")
        return found

    def snapshot(self, request: Request) -> tuple[str, dict[str, bytes]]:
        """The commit that a request names by its id, a branch or a tag, and its files."""
        repository, revision = self.repository(request), request.path_params.get("revision", "main")
        oid = repository.refs.get(revision, revision)
        if oid not in repository.commits:
            raise error(404, "RevisionNotFound", f"No revision {revision}.")
        return oid, repository.commits[oid]

    # Writing

    async def create(self, request: Request) -> Response:
        asked, user = await request.json(), self.user(request)
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if user is None:
            raise error(401, "Unauthorized", "Who is writing?")
        if name.split("/")[0] != user:
            raise error(403, "Forbidden", f"{user} may not create {name}.")
        known = name in self.repositories
        if not known:
            self.repositories[name] = Repository(name, private=asked.get("visibility") == "private")
            self.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return JSONResponse({"url": f"{self.url}/{name}", "name": name, "id": name}, 409 if known else 200)

    async def make_ref(self, request: Request) -> Response:
        """A branch is named in the path and starts where the body says; a tag the other way round."""
        repository, asked = self.repository(request, write=True), await request.json()
        name = request.path_params.get("branch") or asked["tag"]
        start = request.path_params.get("revision") or asked.get("startingPoint", "main")
        if name in repository.refs:
            raise error(409, "Conflict", f"{name} exists.")
        repository.refs[name] = repository.refs.get(start, start)
        return JSONResponse({})

    async def preupload(self, request: Request) -> Response:
        self.repository(request, write=True)
        (_, files), asked = self.snapshot(request), await request.json()
        told = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": content_id(file["path"], files[file["path"]]) if file["path"] in files else None,
            }
            for file in asked["files"]
        ]
        return JSONResponse({"files": told})

    async def lfs_batch(self, request: Request) -> Response:
        self.repository(request, write=True)
        told = []
        for wanted in (await request.json())["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            told.append(wanted | ({} if wanted["oid"] in self.objects else {"actions": upload}))
        return JSONResponse({"transfer": "basic", "objects": told})

    async def lfs_put(self, request: Request) -> Response:
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            raise error(422, "BadObject", "The content is not what its id says.")
        self.objects[request.path_params["oid"]] = content
        return Response()

    async def commit(self, request: Request) -> Response:
        repository = self.repository(request, write=True)
        files = dict(self.snapshot(request)[1])
        for line in (await request.body()).splitlines():
            kind, value = (json.loads(line)[part] for part in ("key", "value"))
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(request.path_params["revision"], files)
        return JSONResponse({"commitUrl": f"{self.url}/{repository.name}/commit/{oid}", "commitOid": oid})

    async def validate_yaml(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    # Reading

    async def info(self, request: Request) -> Response:
        repository, (oid, files) = self.repository(request), self.snapshot(request)
        siblings = [{"rfilename": path} for path in files]
        names = {"id": repository.name, "modelId": repository.name}
        return JSONResponse(names | {"sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    async def tree(self, request: Request) -> Response:
        _, files = self.snapshot(request)
        return JSONResponse([entry(path, content) for path, content in files.items()])

    async def resolve(self, request: Request) -> Response:
        (oid, files), path = self.snapshot(request), request.path_params["path"]
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            raise error(404, "EntryNotFound", f"No file {path}.", headers)
        headers["ETag"] = f'"{content_id(path, files[path])}"'
        if is_lfs(path):
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(files[path]))}
        return Response(files[path], headers=headers, media_type="application/octet-stream")

    def app(self) -> Starlette:
        model = "/api/models/{owner}/{name}"
        return Starlette(
            routes=[
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
                Route(f"{model}/preupload/{{revision}}", self.preupload, methods=["POST"]),
                Route(f"{model}/commit/{{revision}}", self.commit, methods=["POST"]),
                Route(f"{model}/branch/{{branch}}", self.make_ref, methods=["POST"]),
                Route(f"{model}/tag/{{revision}}", self.make_ref, methods=["POST"]),
                Route(f"{model}/revision/{{revision}}", self.info),
                Route(f"{model}/tree/{{revision}}", self.tree),
                Route(model, self.info),
                Route("/{owner}/{name}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
                Route("/lfs/{oid}", self.lfs_put, methods=["PUT"]),
                Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
            ],
            exception_handlers={HTTPException: refusal},
        )


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> HTTPException:
    return HTTPException(status, message, {"X-Error-Code": code, "X-Error-Message": message} | (headers or {}))


async def refusal(request: Request, refused: HTTPException) -> Response:
    return JSONResponse({"error": refused.detail}, refused.status_code, headers=refused.headers)


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def content_id(path: str, content: bytes) -> str:
    """What LFS calls a file, or git."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    told = {"type": "file", "path": path, "size": len(content), "oid": content_id(path, content)}
    return told | ({"lfs": {"oid": told["oid"], "size": len(content), "pointerSize": 130}} if is_lfs(path) else {})


@contextmanager
def serving():
    """A Hub that listens on a free port of this machine; its `url` is the clients' HF_ENDPOINT."""
    hub = Hub()
    server = uvicorn.Server(uvicorn.Config(hub.app(), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
