"""A pretended bucket: Google Cloud Storage's protocol on a local port, and epath's view of it.

One dict of objects has two doors:

- TensorStore, through which Orbax reads and writes arrays, uses its real driver for gs://.
  TENSORSTORE_GCS_HTTP_URL sends it to the port.
- epath uses its real backend for gs://, with `Files` in the place of gcsfs. Or it uses gcsfs,
  which STORAGE_EMULATOR_HOST sends to the port.

What a bucket cannot do, to append or to rename, raises `Refused`.
"""

import json
import re
import sys
import threading
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from etils.epath import backend, gpath
from fsspec import config
from fsspec.implementations.memory import MemoryFile
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem
from orbax.checkpoint._src.path import gcs_utils


def serve(bucket, patch, with_gcsfs):
    """Puts a bucket behind gs://, by a pytest.MonkeyPatch.

    with_gcsfs: gcsfs reads it through the port; otherwise `Files` does.
    """
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{bucket.port}")
    # Nobody gives credentials there.
    patch.setenv("GCE_METADATA_ROOT", f"127.0.0.1:{bucket.port}")
    patch.setenv("EPATH_USE_TF", "false")
    if with_gcsfs:
        patch.setenv(
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
        )  # which asks another service, by gRPC, what kind of bucket it is
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{bucket.port}")
        patch.setitem(config.conf, "gcs", {"token": "anon"})
        gcs_utils.get_bucket.cache_clear()
    else:
        patch.setattr(Files, "store", bucket)
        patch.setitem(_registry, "gcs", Files)
        # Whether a bucket has real folders Orbax asks google-cloud-storage, which comes with gcsfs.
        patch.setattr(
            gcs_utils,
            "get_bucket",
            lambda name: types.SimpleNamespace(hierarchical_namespace_enabled=False),
        )
    backend.fsspec_backend._get_filesystem.cache_clear()
    gpath._is_tf_installed.cache_clear()


class Refused(AssertionError):
    """What no bucket does; not an OSError, which somebody might pass over."""


class Bucket:
    """Objects by the name bucket/object, with the number of each writing; `port` serves them."""

    def __init__(self):
        self.objects, self.generation, self.lock = {}, 0, threading.RLock()
        self.begun = []  # uploads in pieces: name and what has come of it
        self.requests = []  # method and path of each, for a look at who came through the port
        self.closed = self.read_only = False
        bucket = self

        class Handler(_Handler):
            store = bucket

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, name, data):
        with self.lock:
            self.generation += 1
            self.objects[name] = (bytes(data), self.generation)
            return self.about(name)

    def get(self, name):
        with self.lock:
            return self.objects[name][0]

    def about(self, name):
        data, generation = self.objects[name]
        bucket, _, key = name.partition("/")
        now = "2026-01-01T00:00:00.000Z"
        about = {
            "kind": "storage#object",
            "bucket": bucket,
            "name": key,
            "size": str(len(data)),
            "updated": now,
        }
        return {
            **about,
            "timeCreated": now,
            "generation": str(generation),
            "metageneration": "1",
            "id": f"{name}/{generation}",
        }

    def under(self, prefix):
        """Names that begin with a prefix, sorted."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client may go at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """The few calls of the JSON protocol that TensorStore and gcsfs make."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = (
        -1,
        True,
    )  # an answer is one packet: in two, each waits for the other side
    store = None

    def log_message(self, *_):
        pass

    def _answer(self, status, body=b"", **headers):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _asked(self):
        url = urllib.parse.urlsplit(self.path)
        found = re.fullmatch(
            r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?(/)?", url.path
        )
        query = {
            k: v[0] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()
        }
        self.store.requests.append((self.command, url.path))
        if found is None:
            return url.path, "", None, query
        return found[1] or "", found[2], urllib.parse.unquote(found[3]) if found[3] else None, query

    def _missing(self):
        self._answer(404, {"error": {"code": 404, "message": "no such object"}})

    def _fits(self, name, query):
        """Whether the object is the one that the request speaks of."""
        now = self.store.objects.get(name, (b"", 0))[1]
        wanted, other = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        return (wanted is None or int(wanted) == now) and (other is None or int(other) != now)

    def do_GET(self):
        _, bucket, key, query = self._asked()
        if self.store.closed:
            return self._answer(403, {"error": {"code": 403, "message": "no right to read"}})
        with self.store.lock:
            if key is None:
                is_list = urllib.parse.urlsplit(self.path).path.rstrip("/").endswith("/o")
                return self._answer(
                    200,
                    self._listed(bucket, query)
                    if is_list
                    else {"name": bucket, "kind": "storage#bucket"},
                )
            name = f"{bucket}/{key}"
            if name not in self.store.objects:
                return self._missing()
            if not self._fits(name, query):
                return self._answer(304)
            if query.get("alt") != "media" and "/download/" not in self.path:
                return self._answer(200, self.store.about(name))
            data, generation = self.store.objects[name]
        self._send(data, generation)

    def _send(self, data, generation):
        headers = {"Content_Type": "application/octet-stream", "x_goog_generation": str(generation)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self._answer(200, data, **headers)
        first = int(span[1]) if span[1] else len(data) - int(span[2])
        last = int(span[2]) if span[1] and span[2] else len(data) - 1
        if first >= len(data):
            return self._answer(416, b"", Content_Range=f"bytes */{len(data)}")
        part = data[first : last + 1]
        return self._answer(
            206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(data)}", **headers
        )

    def _listed(self, bucket, query):
        prefix, cut = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in self.store.under(f"{bucket}/{prefix}"):
            key = name.partition("/")[2]
            if (
                key < query.get("startOffset", "")
                or query.get("endOffset")
                and key >= query["endOffset"]
            ):
                continue
            head, found, _ = key[len(prefix) :].partition(cut) if cut else (key, "", "")
            if found:
                prefixes.add(prefix + head + found)
            else:
                items.append(self.store.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self):
        body = self._body()
        how, bucket, _, query = self._asked()
        if self.store.read_only:
            return self._answer(403, {"error": {"code": 403, "message": "no right to write"}})
        if how != "upload":
            return self._batch(body) if how.startswith("/batch") else self._answer(501)
        name = query.get("name")
        if query.get("uploadType") == "multipart":
            edge = (
                b"--"
                + re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])[1].encode()
            )
            about, data = (
                part.split(b"\r\n\r\n", 1) if b"\r\n\r\n" in part else part.split(b"\n\n", 1)
                for part in body.split(edge)[1:3]
            )
            name, body = json.loads(about[1])["name"], re.sub(rb"\r?\n$", b"", data[1])
        if query.get("uploadType") == "resumable":
            return self._piece(bucket, query, body)
        with self.store.lock:
            if not self._fits(f"{bucket}/{name}", query):
                return self._answer(412, {"error": {"code": 412, "message": "generation"}})
            return self._answer(200, self.store.put(f"{bucket}/{name}", body))

    def _piece(self, bucket, query, body):
        """An upload in pieces; the object is there when the last piece has come."""
        if "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            with self.store.lock:
                self.store.begun.append([f"{bucket}/{name}", b""])
                number = len(self.store.begun) - 1
            where = (
                f"http://127.0.0.1:{self.store.port}/upload/storage/v1/b/{bucket}/o"
                f"?uploadType=resumable&upload_id={number}"
            )
            return self._answer(200, {}, Location=where)
        with self.store.lock:
            begun = self.store.begun[int(query["upload_id"])]
            begun[1] += body
            if self.headers["Content-Range"].endswith("/*"):
                return self._answer(308, b"", Range=f"bytes=0-{len(begun[1]) - 1}")
            return self._answer(200, self.store.put(*begun))

    def do_PUT(self):
        self.do_POST()

    def _delete(self, name):
        if self.store.read_only:
            return 403
        return 404 if self.store.objects.pop(name, None) is None else 204

    def do_DELETE(self):
        _, bucket, key, _ = self._asked()
        with self.store.lock:
            self._answer(self._delete(f"{bucket}/{key}"))

    def _batch(self, body):
        """Several deletions in one request."""
        parts = []
        for i, path in enumerate(re.findall(rb"DELETE (\S+)", body), 1):
            found = re.search(r"/b/([^/]+)/o/([^?]+)", path.decode())
            with self.store.lock:
                status = self._delete(f"{found[1]}/{urllib.parse.unquote(found[2])}")
            parts.append(
                f"--edge\r\nContent-Type: application/http\r\nContent-ID: <response-{i}>"
                f"\r\n\r\nHTTP/1.1 {status} x\r\n\r\n"
            )
        self._answer(
            200,
            ("".join(parts) + "--edge--").encode(),
            Content_Type="multipart/mixed; boundary=edge",
        )


class Files(AbstractFileSystem):
    """What epath asks of a file system, of the same objects."""

    protocol = ("gs", "gcs")
    cachable = False
    store = None

    def _name(self, path):
        return self._strip_protocol(path)

    def ls(self, path, detail=True, **_):
        name = self._name(path)
        if self.store.closed:
            raise PermissionError("no right to read")
        found = {}
        for key in self.store.under(name):
            if key == name:
                found[key] = self.info(key)
            elif key.startswith(name + "/"):
                head, cut, _ = key[len(name) + 1 :].partition("/")
                child = f"{name}/{head}"
                found[child] = (
                    {"name": child, "size": 0, "type": "directory"} if cut else self.info(child)
                )
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path, **_):
        name = self._name(path)
        if name in self.store.objects:
            return {"name": name, "size": len(self.store.get(name)), "type": "file"}
        if self.store.closed:
            raise PermissionError("no right to read")
        if not self.store.under(name + "/"):
            raise FileNotFoundError(path)
        return {"name": name, "size": 0, "type": "directory"}

    def exists(self, path, **kwargs):
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def _open(self, path, mode="rb", **_):
        name = self._name(path)
        if mode == "rb":
            if name not in self.store.objects:
                raise FileNotFoundError(path)
            return MemoryFile(None, name, self.store.get(name))
        if mode != "wb":
            raise Refused(f"{path} opened with mode {mode}")
        return _Written(self.store, name)

    def rm_file(self, path):
        if self.store.read_only:
            raise PermissionError("no right to delete")
        with self.store.lock:
            if self.store.objects.pop(self._name(path), None) is None:
                raise FileNotFoundError(path)

    def rm(self, path, recursive=False, maxdepth=None):
        names = self.find(path) if recursive else [path]
        if not names:
            raise FileNotFoundError(path)
        for name in names:
            self.rm_file(name)

    def mkdir(self, path, create_parents=True, **_):
        """There are no folders to make."""

    def makedirs(self, path, exist_ok=False):
        """There are no folders to make."""

    def rmdir(self, path):
        """There are no folders to remove."""

    def mv(self, path1, path2, **_):
        raise Refused(f"{path1} renamed to {path2}")

    def cp_file(self, path1, path2, **_):
        raise Refused(f"{path1} copied to {path2}")


class _Written(MemoryFile):
    """An object that is there once it is closed, and not before."""

    def __init__(self, store, name):
        super().__init__(None, name)
        self._store, self._done = store, False

    def close(self):
        if not self._done:
            self._done = True
            if self._store.read_only:
                raise PermissionError("no right to write")
            self._store.put(self.path, self.getvalue())
