"""Images of tasks against a registry of our own: patience, shared pulls, what is missing, room on the disk."""

import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading

import docker_images
import pytest

from common import images as module
from common.errors import InfraError
from common.images import GIGABYTE, Images

pytestmark = [pytest.mark.docker, pytest.mark.slow]


class Registry:
    """The few addresses of a registry that a pull asks for; it can be told to refuse."""

    def __init__(self):
        self.refuse, self.cut, self.asked, self.blobs = 0, 0, [], {}
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                registry.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, data: bytes) -> dict:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return {"digest": digest, "size": len(data)}

    def image(self, name: str, machine: str = "amd64") -> str:
        """Offer an image with one small file of its own; returns what to pull."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            member = tarfile.TarInfo("name.txt")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
        layer = stream.getvalue()
        config = {"architecture": machine, "os": "linux", "config": {},
                  "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]}}
        kind = "application/vnd.docker."
        self.blobs[f"/v2/{name}/manifests/latest"] = manifest = json.dumps({
            "schemaVersion": 2, "mediaType": kind + "distribution.manifest.v2+json",
            "config": {"mediaType": kind + "container.image.v1+json", **self.put(json.dumps(config).encode())},
            "layers": [{"mediaType": kind + "image.rootfs.diff.tar.gzip", **self.put(gzip.compress(layer))}],
        }).encode()  # fmt: skip
        self.put(manifest)
        return f"{self.address}/{name}:latest"

    def answer(self, request) -> None:
        self.asked.append(request.path)
        data, code = b"", 200
        if "/manifests/" in request.path and self.refuse:
            self.refuse -= 1
            code, data = 429, b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}'
        elif request.path != "/v2/":
            data = self.blobs.get(request.path, self.blobs.get(request.path.rsplit("/", 1)[1], b""))
            if not data:
                code, data = 404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}'
        request.send_response(code)
        if "/manifests/" in request.path and code == 200:
            request.send_header("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
            request.send_header("Docker-Content-Digest", "sha256:" + hashlib.sha256(data).hexdigest())
        else:
            request.send_header("Content-Type", "application/octet-stream" if code == 200 else "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command == "GET" and "/blobs/" in request.path and self.cut:
            self.cut -= 1
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
        elif request.command == "GET":
            request.wfile.write(data)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if docker_images.why_not():
        pytest.skip(docker_images.why_not())
    return Registry()


@pytest.fixture
def client(registry):
    import docker

    client = docker.from_env()
    yield client
    for image in client.images.list():
        if any(tag.startswith(registry.address) for tag in image.tags):
            client.images.remove(image.id, force=True)


def test_a_pull_is_patient_and_shared(registry, client, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    name, images, ids = registry.image("one"), Images(client), []
    registry.refuse = 3
    threads = [threading.Thread(target=lambda: ids.append(images.use(name, "t"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(ids) == 6 and len(set(ids)) == 1 and images.users == {name: 6}
    assert registry.refuse == 0
    layers = [path for path in registry.asked if "/blobs/" in path]
    assert len(layers) == len(set(layers)) == 2  # the config and the layer, once


def test_patience_ends(registry, client, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    name = registry.image("busy")
    registry.refuse = 10_000
    with pytest.raises(InfraError, match="t: cannot pull .*slow down|t: cannot pull .*toomanyrequests"):
        Images(client).use(name, "t")


def test_a_missing_image_is_asked_for_once(registry, client):
    images = Images(client)
    for _ in range(2):
        with pytest.raises(InfraError, match="t: image .*/nothing:latest is neither here nor in its registry"):
            images.use(f"{registry.address}/nothing:latest", "t")
        before = before if _ else len(registry.asked)
    assert len(registry.asked) == before and images.users == {f"{registry.address}/nothing:latest": 0}


def test_a_download_that_breaks_off_is_tried_again(registry, client, monkeypatch):
    """The engine says so in the middle of an answer that began well; the image is not missing for that."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    name, images = registry.image("broken"), Images(client)
    registry.cut = 12  # the engine itself tries a layer several times
    assert images.use(name, "t") and not images.missing
    assert registry.cut == 0


def test_the_list_of_what_is_missing(registry, client, capsys):
    name = registry.image("there")
    missing = [f"{registry.address}/a:latest", f"{registry.address}/b:latest"]
    assert Images(client).check([name, docker_images.BASE, *missing, missing[0]]) == missing
    assert capsys.readouterr().err.count("missing image ") == 2


def test_another_machines_image_is_refused(registry, client):
    other = "arm64" if Images(client).machine == "amd64" else "amd64"
    with pytest.raises(InfraError, match=f"t: image .* is for {other}, the engine runs"):
        Images(client).use(registry.image("foreign", other), "t")


def test_room_on_the_disk(registry, client, monkeypatch):
    import docker

    old, new = registry.image("old"), registry.image("new")
    free = [20 * GIGABYTE]
    monkeypatch.setattr(Images, "free", lambda self: free[0])
    careful, evicting = Images(client), Images(client, evict=True)
    for images in (careful, evicting):
        images.use(old, "t")
        images.use(docker_images.BASE, "t")
    free[0] = GIGABYTE
    for images in (careful, evicting):  # all are in use
        with pytest.raises(InfraError, match="t: 1.0 GB are free at .*, and no image is pulled below 10 GB"):
            images.use(new, "t")
        images.leave(old)
        images.leave(docker_images.BASE)
    with pytest.raises(InfraError, match="--evict-images"):
        careful.use(new, "t")
    with pytest.raises(InfraError, match="no image is pulled"):  # it removed what it could, and that was too little
        evicting.use(new, "t")
    with pytest.raises(docker.errors.ImageNotFound):
        client.images.get(old)
    client.images.get(docker_images.BASE)  # built here: it could not be had again
    free[0] = 20 * GIGABYTE
    evicting.use(new, "t")


def test_room_is_made_of_what_earlier_stages_pulled(registry, client, monkeypatch):
    """Every stage is a process of its own; a disk that iteration 1 filled must not stop iteration 2."""
    import docker

    earlier, wanted, new = (registry.image(name) for name in ("earlier", "wanted", "new"))
    Images(client).use(earlier, "t")
    Images(client).use(wanted, "t")
    images = Images(client, evict=True)
    images.wanted = {wanted, new}
    free, removed = [GIGABYTE], []
    monkeypatch.setattr(Images, "free", lambda self: free[0])
    collection = type(client.images)
    remove = collection.remove

    def removing(self, image):
        remove(self, image)
        removed.append(image)
        free[0] += 12 * GIGABYTE

    monkeypatch.setattr(collection, "remove", removing)
    images.use(new, "t")
    monkeypatch.undo()
    assert removed == [earlier]  # what this stage has still to run stays as long as it can
    client.images.get(wanted)
    with pytest.raises(docker.errors.ImageNotFound):
        client.images.get(earlier)


def test_an_engine_that_fails_is_the_machines_trouble(registry, client, monkeypatch):
    """Whatever the engine says while an image is looked for, one task is put off, and not the stage ended."""
    import docker
    import requests

    for error in (requests.ConnectionError("gone"), requests.ReadTimeout("late"), docker.errors.APIError("500")):
        images = Images(client)

        def get(self, image, error=error):
            raise error

        monkeypatch.setattr(type(client.images), "get", get)
        with pytest.raises(InfraError, match="t: image x: "):
            images.use("x", "t")
        assert images.users == {"x": 0}
        monkeypatch.undo()


def test_images_that_nobody_pulled_here_stay(registry, client, monkeypatch):
    own, new = registry.image("own"), registry.image("new")
    client.images.pull(own)  # by hand
    images = Images(client, evict=True)
    images.use(own, "t")
    images.leave(own)
    monkeypatch.setattr(Images, "free", lambda self: GIGABYTE)
    with pytest.raises(InfraError, match="no image is pulled"):
        images.use(new, "t")
    client.images.get(own)
