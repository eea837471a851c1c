"""The system call filter of the local sandbox, as a program for bwrap's --seccomp.

It closes the ways to memory that belongs to no process, which the sandbox's watcher cannot see (memfd, System V shared
memory and semaphores, keyrings, a tmpfs in a user namespace of one's own), sockets of families that a network
namespace does not hold (vsock reaches the hypervisor) and some of the kernel's wider doors (bpf, io_uring, userfaultfd,
perf). Everything else is allowed; what sockets and pipes hold stays unseen, bounded by the number of open files. On
machines other than x86-64 and 64-bit ARM there is no filter.
"""

import errno
import platform
import struct

CLONE_NEWUSER = 0x10000000
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF instructions on 32-bit words
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data

# architecture id; clone, unshare, clone3, socket; then memfd_create, memfd_secret, shmget, msgget, semget, add_key,
# request_key, keyctl, bpf, userfaultfd, perf_event_open, io_uring_setup
MACHINES = {
    "x86_64": (0xC000003E, 56, 272, 435, 41, (319, 447, 29, 68, 64, 248, 249, 250, 321, 323, 298, 425)),
    "aarch64": (0xC00000B7, 220, 97, 435, 198, (279, 447, 194, 186, 190, 217, 218, 219, 280, 282, 241, 425)),
}
FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK


def program() -> bytes | None:
    """The filter for this machine, or None."""
    if platform.machine() not in MACHINES:
        return None
    architecture, clone, unshare, clone3, socket, refused = MACHINES[platform.machine()]
    missing, forbidden = ERRNO | errno.ENOSYS, ERRNO | errno.EPERM
    code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, missing), (LOAD, 0, 0, NUMBER)]
    # x32 calls have numbers of their own; clone3's flags cannot be read here, and every libc falls back to clone
    code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, missing)]
    for number in (clone3, *refused):
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, missing)]
    for number in (clone, unshare):
        code += [(EQUAL, 0, 4, number), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, CLONE_NEWUSER),
                 (RETURN, 0, 0, forbidden), (RETURN, 0, 0, ALLOW)]
    code += [(EQUAL, 0, len(FAMILIES) + 2, socket), (LOAD, 0, 0, FIRST_ARGUMENT)]
    code += [(EQUAL, len(FAMILIES) - place, 0, family) for place, family in enumerate(FAMILIES)]
    code += [(RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
