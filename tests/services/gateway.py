"""The gateway before PostgREST: checks a project's keys, and serves /rest/v1/ like hosted Supabase."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_CADDYFILE = """
{
    admin off
    auto_https off
    persist_config off
}
http://127.0.0.1:%(port)d {
    bind 127.0.0.1
    map {header.apikey} {token} {
        %(tokens)s
        default ""
    }
    route {
        @missing not header apikey *
        handle @missing {
            header Content-Type application/json
            respond %(no_key)s 401
        }
        @unknown vars {token} ""
        handle @unknown {
            header Content-Type application/json
            respond %(wrong_key)s 401
        }
        handle_path /rest/v1/* {
            # Authorization is passed unchanged; a new key in it is not a JWT.
            @plain not header Authorization *
            request_header @plain Authorization "Bearer {token}"
            request_header -apikey
            reverse_proxy 127.0.0.1:%(rest_port)d
        }
        handle {
            header Content-Type application/json
            respond %(no_route)s 404
        }
    }
}
"""
_ANSWERS = {
    "no_key": {
        "message": "No API key found in request",
        "hint": "No `apikey` request header or url param was found.",
    },
    "wrong_key": {"message": "Invalid API key", "hint": "Double check your API key."},
    "no_route": {"message": "no Route matched with those values"},
}


def caddy() -> str | None:
    """The path of Caddy, as installed by pip; None if missing."""
    return shutil.which("caddy", path=str(Path(sys.executable).parent))


def caddyfile(port: int, rest_port: int, tokens: Mapping[str, str]) -> str:
    """The configuration of a gateway.

    Args:
        port: of 127.0.0.1.
        rest_port: of PostgREST.
        tokens: the JWT of each key.
    """
    lines = "\n        ".join(f'"{key}" "{token}"' for key, token in tokens.items())
    # JSON encoded as a JSON string is also a valid quoted token of a Caddyfile.
    answers = {name: json.dumps(json.dumps(answer)) for name, answer in _ANSWERS.items()}
    return _CADDYFILE % {"port": port, "rest_port": rest_port, "tokens": lines, **answers}
