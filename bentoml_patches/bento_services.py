"""BentoML's loading of a Bento: a server may have other services than the machine that built the Bento."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bentoml

if TYPE_CHECKING:
    from bentoml import Bento


def patch() -> None:
    """Let a Bento be served with services that its bento.yaml does not list.

    There is one runner for each GPU of the host that serves; the file lists those of the host that built it,
    and BentoML ends with StopIteration at the first other one. It looks there only for the versions of models
    in BentoML's store, of which our services have none.
    """

    def on_load_bento(service: bentoml.Service[Any], bento: Bento) -> None:
        for each in service.all_services().values():
            each.bento = bento

    bentoml.Service.on_load_bento = on_load_bento
