"""Docker images of tasks: shared pulls with patience, room on the disk, and a list of what is missing.

A missing image, one for another machine and a full disk are failures of the machine (InfraError) for the tasks that need
the image, and for no other.
"""

import contextlib
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator

from common.embedded import cache_dir
from common.errors import InfraError

GIGABYTE = 1 << 30
LOW_DISK = 10 * GIGABYTE  # no image is pulled when less is free
PULLS = threading.BoundedSemaphore(4)  # at the same time
TRIES = 6
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}  # as the engine calls itself: as images are marked


class Images:
    """The images of one engine, for all threads of this process."""

    def __init__(self, client, evict: bool = False):
        """evict: when room is short, remove images that were pulled here, by this stage or an earlier one, and are not in use."""
        self.client, self.evict = client, evict
        info = client.info()
        self.root = info.get("DockerRootDir", "")
        self.machine = MACHINES.get(info.get("Architecture", ""), info.get("Architecture", ""))
        self.lock = threading.Lock()
        self.pulling: dict[str, threading.Lock] = {}
        self.users: dict[str, int] = {}  # image -> open sandboxes; those with 0 are of finished tasks
        self.checked: set[str] = set()  # whether they can be had
        self.wanted: set[str] = set()  # of this stage's tasks, begun or not
        self.pulled = cache_dir() / "pulled_images"  # one a line: what any process of this user has pulled
        self.missing: dict[str, str] = {}  # image -> why it cannot be had

    def use(self, image: str, who: str) -> str:
        """The id of an image, pulled if it is not there; give it back with leave(). Raises InfraError."""
        import docker
        import requests

        with self.lock:
            self.users[image] = self.users.get(image, 0) + 1
            pulling = self.pulling.setdefault(image, threading.Lock())
        try:
            with pulling:
                if image in self.missing:
                    raise InfraError(f"{who}: {self.missing[image]}")
                try:
                    found = self.client.images.get(image)
                except docker.errors.ImageNotFound:
                    found = self._pull(image, who)
            machine = found.attrs.get("Architecture") or self.machine
            if machine != self.machine:
                raise InfraError(f"{who}: image {image} is for {machine}, the engine runs {self.machine}")
            return found.id
        except (docker.errors.DockerException, requests.RequestException, OSError) as error:
            self.leave(image)
            raise InfraError(f"{who}: image {image}: {' '.join(str(error).split())[-300:]}") from error
        except BaseException:
            self.leave(image)
            raise

    @contextlib.contextmanager
    def held(self, image: str, who: str) -> Iterator[str]:
        """use() and leave() around a block."""
        found = self.use(image, who)
        try:
            yield found
        finally:
            self.leave(image)

    def leave(self, image: str) -> None:
        """Say that a sandbox no longer uses its image."""
        with self.lock:
            self.users[image] -= 1

    def _pull(self, image: str, who: str):
        """Pull with patience: registries limit rates and networks fail; an image that is not there is not there."""
        import docker
        import requests

        self._make_room(who)
        for attempt in range(TRIES):
            try:
                with PULLS:
                    found = self._pull_once(image)
                with contextlib.suppress(OSError):  # then it stays when room is made
                    self.pulled.parent.mkdir(parents=True, exist_ok=True)
                    with open(self.pulled, "a", encoding="utf-8") as names:
                        names.write(f"{image}\n")
                return found
            except (docker.errors.APIError, requests.RequestException) as error:
                why = " ".join(str(getattr(error, "explanation", None) or error).split())[-300:]
                if isinstance(error, docker.errors.NotFound) or re.search("denied|not found|manifest unknown", why):
                    self.missing[image] = f"image {image} is neither here nor in its registry ({why})"
                    raise InfraError(f"{who}: {self.missing[image]}") from None
                if attempt == TRIES - 1:
                    raise InfraError(f"{who}: cannot pull {image}: {why}") from None
            time.sleep(min(30.0, 2**attempt) * random.uniform(0.5, 1.0))

    def _pull_once(self, image: str):
        """As client.images.pull, which says nothing of an error that comes after the pull began."""
        from docker.errors import APIError
        from docker.utils import parse_repository_tag

        repository, tag = parse_repository_tag(image)
        for event in self.client.api.pull(repository, tag=tag or "latest", stream=True, decode=True):
            if "error" in event:
                raise APIError(event["error"])
        return self.client.images.get(image)

    def free(self) -> int | None:
        """Bytes free where the engine keeps its images; None if that is not on this machine."""
        try:
            status = os.statvfs(self.root)
        except OSError:
            return None
        return status.f_bavail * status.f_frsize

    def _make_room(self, who: str) -> None:
        import docker

        free = self.free()
        if free is None or free >= LOW_DISK:
            return
        if self.evict:
            earlier = self.pulled.read_text(encoding="utf-8").splitlines() if self.pulled.exists() else []
            with self.lock:
                idle = [image for image in dict.fromkeys(earlier) if not self.users.get(image)]
                # those of this stage's tasks last (their patches are graded yet), and of these the ones not begun; the
                # engine itself refuses to remove what another process runs
                idle.sort(key=lambda image: (image in self.wanted) + (image in self.wanted - self.users.keys()))
            for image in idle:
                with contextlib.suppress(docker.errors.DockerException):
                    if self.client.images.get(image).attrs.get("RepoDigests"):  # what was built here cannot be had again
                        self.client.images.remove(image)
                if self.free() >= LOW_DISK:
                    return
        raise InfraError(f"{who}: {free / GIGABYTE:.1f} GB are free at {self.root}, and no image is pulled below "
                         f"{LOW_DISK // GIGABYTE} GB" + ("" if self.evict else "; --evict-images removes those "
                                                         "that are not in use"))  # fmt: skip

    def check(self, wanted: list[str]) -> list[str]:
        """Which of these images are neither here nor in their registry; says so on stderr, one line each."""
        import docker

        def there(image: str) -> str | None:
            try:
                self.client.images.get(image)
            except docker.errors.ImageNotFound:
                try:
                    self.client.images.get_registry_data(image)
                except docker.errors.DockerException as error:
                    return " ".join(str(getattr(error, "explanation", None) or error).split())[-200:]
            return None

        wanted = [image for image in dict.fromkeys(wanted) if image not in self.checked]
        self.checked |= set(wanted)
        with ThreadPoolExecutor(8) as pool:
            missing = [(image, why) for image, why in zip(wanted, pool.map(there, wanted)) if why is not None]
        for image, why in missing:
            print(f"missing image {image}: {why}", file=sys.stderr)
        return [image for image, _ in missing]
