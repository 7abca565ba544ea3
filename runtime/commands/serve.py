"""`mobiquant serve`: flags of the HTTP server (runtime.server) and its start."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys

from runtime.commands.options import add_model_options, one_line_errors, open_model


def add_serve(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="answer over HTTP, in the form of the OpenAI API",
        description="Serve /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics. A request may set "
        "`avg_bits` or `bits` for itself. Needs: pip install 'mobiquant[server]'. "
        "Example: mobiquant serve -m model.gguf --avg-bits 3.5",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=8080, help="(%(default)s; 0: any free one)")
    parser.add_argument("--api-key", metavar="KEY", help="that requests must bring; also $MOBIQUANT_API_KEY")
    parser.add_argument("-np", "--parallel", type=int, default=1, metavar="N", help="requests at a time (%(default)s)")
    parser.add_argument("--queue", type=int, default=32, metavar="N", help="requests that may wait (%(default)s)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of one answer (the context)")
    parser.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="of one request (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request (%(default)s)")
    add_model_options(parser)
    parser.set_defaults(func=serve_command)


@one_line_errors
def serve_command(args: argparse.Namespace) -> int:
    """`mobiquant serve`: until Ctrl-C."""
    for name, value in (("--parallel", args.parallel), ("--max-body", args.max_body), ("--timeout", args.timeout)):
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, found {value}")
    if args.queue < 0 or (args.max_tokens is not None and args.max_tokens < 1):
        raise ValueError("--queue and --max-tokens: expected positive numbers")
    api_key = args.api_key or os.environ.get("MOBIQUANT_API_KEY") or None
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("--api-key: expected printable ASCII, as an HTTP header can hold")
    if api_key is None and not _is_loopback(args.host):
        raise ValueError(f"--host {args.host}: others can reach it, so expected an --api-key, found none")
    try:
        import uvicorn

        from runtime.server.app import Limits, Server
        from runtime.server.connection import connection_class
    except ImportError as error:
        raise ImportError(f"serving needs more packages ({error}); run: pip install 'mobiquant[server]'") from error
    limits = Limits(args.max_body, args.max_tokens, args.parallel, args.queue, args.timeout)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listener, open_model(args) as model:
        config = uvicorn.Config(
            Server(model, limits, api_key).app(),
            http=connection_class(limits.sessions + limits.queue + 64),  # those refused for a full queue included
            ws="none",
            log_level="error",  # what clients do wrong is no news
            timeout_graceful_shutdown=5,
        )
        print(f"listening on http://{args.host}:{listener.getsockname()[1]}/v1", file=sys.stderr, flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
