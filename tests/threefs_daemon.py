"""A file system in memory that mounts itself as 3FS does: `python threefs_daemon.py FOLDER`.

It answers the kernel's FUSE requests (linux/fuse.h, 7.31) one after the other. From 3FS it has the
type of the mount, the virtual tree, what a rename into `rm-rf` does, listings that carry
attributes, and how long the kernel may remember what it was told. It has no chunks, no lengths
that lag, no permissions and no other clients.

It says "mounted", or why not, and ends when it is unmounted. A link `set-conf/lose-rename` makes it
do the next rename and report an error; `get-conf/sys.deletions` counts unlink and rmdir,
`get-conf/sys.pid` is whom to kill.
"""

import ctypes
import errno
import os
import stat
import struct
import sys

# 3FS' defaults, in seconds: what is there, what is not
VALID, NEGATIVE = 30, 5
BIG_WRITES, READDIRPLUS = 1 << 5, 1 << 13
MAX_WRITE = 2**20
CHUNK = 4 * 2**20
SIZE_IS_SET = 1 << 3
ROOT = 1


class Node:
    """A file (data), a link (its target as data) or a folder (children by name)."""

    def __init__(self, mode, data=b""):
        self.mode, self.data, self.children, self.links = mode, bytearray(data), {}, 1


class System:
    """The nodes by number, and a method for each request: the node's number, the bytes after it."""

    def __init__(self):
        self.nodes, self.deletions, self.loses = {ROOT: Node(stat.S_IFDIR | 0o755)}, 0, False
        virtual = self.make(ROOT, "3fs-virt", stat.S_IFDIR | 0o555)
        names = ("rm-rf", "iovs", "get-conf", "set-conf")
        self.virtual = {name: self.make(virtual, name, stat.S_IFDIR | 0o777) for name in names}
        settings = {"usr.readonly": "false", "usr.attr_timeout": str(VALID)}
        settings |= {"sys.deletions": "0", "sys.pid": str(os.getpid())}
        for name, value in settings.items():
            self.make(self.virtual["get-conf"], name, stat.S_IFLNK | 0o444, value.encode())

    def make(self, folder, name, mode, data=b""):
        number = len(self.nodes) + 1
        self.nodes[number] = Node(mode, data)
        self.nodes[folder].children[name] = number
        return number

    def find(self, folder, name):
        if name not in self.nodes[folder].children:
            raise OSError(errno.ENOENT, name)
        return self.nodes[folder].children[name]

    def attributes(self, number):
        node = self.nodes[number]
        sizes = number, len(node.data), 0, 0, 0, 0
        return struct.pack("<6Q10I", *sizes, 0, 0, 0, node.mode, node.links, 0, 0, 0, CHUNK, 0)

    def entry(self, number):
        return struct.pack("<4Q2I", number, 0, VALID, VALID, 0, 0) + self.attributes(number)

    def start(self, _, body):
        _, minor, readahead = struct.unpack_from("<3I", body)
        flags = BIG_WRITES | READDIRPLUS
        head = struct.pack("<4I2H2I", 7, min(minor, 31), readahead, flags, 32, 24, MAX_WRITE, 1)
        return head + bytes(32)

    def forget(self, *_):
        return None  # the only requests without an answer

    def succeed(self, *_):
        return b""

    def lookup(self, folder, body):
        if text(body) in self.nodes[folder].children:
            return self.entry(self.find(folder, text(body)))
        if folder in self.virtual.values():
            raise OSError(errno.ENOENT, text(body))  # the kernel must not remember it
        return struct.pack("<4Q2I", 0, 0, NEGATIVE, 0, 0, 0) + bytes(88)

    def getattr(self, number, _):
        return struct.pack("<Q2I", VALID, 0, 0) + self.attributes(number)

    def setattr(self, number, body):
        valid, _, _, size = struct.unpack_from("<2I2Q", body)
        if valid & SIZE_IS_SET:
            del self.nodes[number].data[size:]
        return self.getattr(number, body)

    def readlink(self, number, _):
        return bytes(self.nodes[number].data)

    def symlink(self, folder, body):
        name, target = texts(body)
        self.loses |= (folder, name) == (self.virtual["set-conf"], "lose-rename")
        return self.entry(self.make(folder, name, stat.S_IFLNK | 0o777, target.encode()))

    def mkdir(self, folder, body):
        return self.entry(self.make(folder, text(body[8:]), stat.S_IFDIR | 0o755))

    def create(self, folder, body):
        number = self.make(folder, text(body[16:]), stat.S_IFREG | 0o644)
        return self.entry(number) + self.open()

    def link(self, folder, body):
        number, name = struct.unpack_from("<Q", body)[0], text(body[8:])
        if name in self.nodes[folder].children:
            raise OSError(errno.EEXIST, name)
        self.nodes[folder].children[name] = number
        self.nodes[number].links += 1
        return self.entry(number)

    def remove(self, folder, body):
        if self.nodes[self.find(folder, text(body))].children:
            raise OSError(errno.ENOTEMPTY, text(body))
        self.nodes[self.nodes[folder].children.pop(text(body))].links -= 1
        self.deletions += 1
        counter = self.find(self.virtual["get-conf"], "sys.deletions")
        self.nodes[counter].data = bytearray(str(self.deletions).encode())
        return b""

    def rename(self, folder, body, names_at=8):
        (target,), (name, other) = struct.unpack_from("<Q", body), texts(body[names_at:])
        number = self.find(folder, name)
        del self.nodes[folder].children[name]
        if target != self.virtual["rm-rf"]:
            self.nodes[target].children[other] = number
        if self.loses:
            self.loses = False
            raise OSError(errno.EIO, name)
        return b""

    def rename_with_flags(self, folder, body):
        if struct.unpack_from("<Q", body, 8)[0]:
            raise OSError(errno.ENOSYS, "flags")
        return self.rename(folder, body, names_at=16)

    def open(self, *_):
        return bytes(16)

    def read(self, number, body):
        _, offset, size = struct.unpack_from("<2QI", body)
        return bytes(self.nodes[number].data[offset : offset + size])

    def write(self, number, body):
        _, offset, size = struct.unpack_from("<2QI", body)
        data = self.nodes[number].data
        data.extend(bytes(max(0, offset + size - len(data))))
        data[offset : offset + size] = body[40 : 40 + size]
        return struct.pack("<2I", size, 0)

    def statfs(self, *_):
        return struct.pack("<5Q4I", 1000, 500, 500, 0, 0, 2**21, 255, 2**21, 0) + bytes(24)

    def list(self, folder, body):
        _, offset, size = struct.unpack_from("<2QI", body)
        hidden = folder == self.virtual["rm-rf"]
        found = [] if hidden else self.nodes[folder].children.items()
        listing = b""
        for index, (name, number) in enumerate([(".", folder), ("..", ROOT), *found]):
            raw, kind = name.encode(), stat.S_IFMT(self.nodes[number].mode) >> 12
            item = bytes(128) if index < 2 else self.entry(number)
            item += struct.pack("<2Q2I", number, index + 1, len(raw), kind) + raw
            item += bytes(-len(item) % 8)
            if index >= offset and len(listing) + len(item) <= size:
                listing += item
        return listing


REQUESTS = {
    1: System.lookup, 2: System.forget, 3: System.getattr, 4: System.setattr, 5: System.readlink,
    6: System.symlink, 9: System.mkdir, 10: System.remove, 11: System.remove, 12: System.rename,
    13: System.link, 14: System.open, 15: System.read, 16: System.write, 17: System.statfs,
    18: System.succeed, 20: System.succeed, 25: System.succeed, 26: System.start, 27: System.open,
    29: System.succeed, 35: System.create, 36: System.forget, 42: System.forget, 44: System.list,
    45: System.rename_with_flags,
}  # fmt: skip


def text(body):
    """The first of the names in a request."""
    return body.split(b"\0")[0].decode()


def texts(body):
    """The first two of the names in a request."""
    return [part.decode() for part in body.split(b"\0")[:2]]


def answered(system, request):
    """The answer to a request's bytes; None if it wants none."""
    _, kind, unique, number = struct.unpack_from("<2I2Q", request)
    try:
        if kind not in REQUESTS:
            raise OSError(errno.ENOSYS, str(kind))
        code, body = 0, REQUESTS[kind](system, number, request[40:])
    except OSError as error:
        code, body = -error.errno, b""
    return None if body is None else struct.pack("<IiQ", 16 + len(body), code, unique) + body


def mount(folder):
    """Mounts what the descriptor returned will answer for."""
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    if libc.mount(b"hf3fs.stage", folder.encode(), b"fuse.hf3fs", 0, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)
    return device


def serve(device):
    """Answers until the mount is gone."""
    system = System()
    while True:
        try:
            request = os.read(device, 2 * MAX_WRITE)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            raise
        if (answer := answered(system, request)) is not None:
            os.write(device, answer)


if __name__ == "__main__":
    try:
        DEVICE = mount(sys.argv[1])
    except OSError as reason:
        print(reason)
        sys.exit(1)
    print("mounted", flush=True)
    serve(DEVICE)
