"""The playground: a page on which a person tries the server. Files of the browser are in `static/`."""

from playground.files import FILES_LABEL, PATH, Playground

__all__ = ["FILES_LABEL", "PATH", "Playground"]
