"""Serve a folder of static files on loopback, from memory: fast enough to be no bottleneck.

    python scripts/serve_folder.py /usr/share/doc/python3-doc/html --port 8000

Files are read once at the start; "/" and folders give their index.html.
"""

from __future__ import annotations

import argparse
import asyncio
import mimetypes
import signal
import sys
from pathlib import Path
from typing import Final

from aiohttp import web

BYTES_MAX: Final = 1024**3
Site = dict[str, tuple[bytes, str]]


def load(folder: Path) -> Site:
    """Every file below folder by URL path, with its content type.

    Links that lead out of the folder are left out. Raises ValueError when it is all too much.
    """
    site: Site = {}
    total = 0
    root = folder.resolve(strict=True)
    for path in sorted(root.rglob("*")):
        if not path.is_file() or not path.resolve().is_relative_to(root):
            continue
        body = path.read_bytes()
        total += len(body)
        if total > BYTES_MAX:
            raise ValueError(f"{folder} holds more than {BYTES_MAX // 1024**2} MiB")
        name = "/" + path.relative_to(root).as_posix()
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        site[name] = (body, kind)
        if path.name == "index.html":
            site[name.removesuffix("index.html")] = (body, kind)
    return site


def make_server(site: Site) -> web.Server:
    """A server without routes: one look-up an answer."""

    async def handle(request: web.BaseRequest) -> web.Response:
        found = site.get(request.path)
        if found is None and request.path + "/" in site:
            return web.Response(status=301, headers={"Location": request.path + "/"})
        if found is None:
            return web.Response(status=404, text="not here\n")
        return web.Response(body=found[0], headers={"Content-Type": found[1]})

    return web.Server(handle, access_log=None)


async def serve(site: Site, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.ServerRunner(make_server(site))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        bound = runner.addresses[0][1]
        print(f"Serving {len(site)} paths at http://127.0.0.1:{bound}/", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> int:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    arguments = parser.parse_args()
    try:
        asyncio.run(serve(load(arguments.folder), arguments.port))
    except (OSError, OverflowError, ValueError) as error:
        print(f"Cannot serve {arguments.folder}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
