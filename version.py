"""The version of this server, in its one place."""

VERSION = "0.1.0"
