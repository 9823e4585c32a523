"""The routes that Label Studio calls."""

from __future__ import annotations

import hmac
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from adapters.label_studio.errors import AdapterError, BadRequest
from adapters.label_studio.interface import read_interface
from sam3_client import (
    BadImage,
    DirectApiOff,
    InvalidRequest,
    ModelLoading,
    Overloaded,
    Sam3Error,
    ServerUnreachable,
    UnsupportedImage,
)

if TYPE_CHECKING:
    from adapters.label_studio.predictor import Predictor

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024 * 1024
"""An interactive request brings all annotations of its task, brushes as lists of numbers."""

STATUS: dict[type[Sam3Error], int] = {
    BadImage: 422,
    DirectApiOff: 503,
    InvalidRequest: 422,
    ModelLoading: 503,
    Overloaded: 503,
    ServerUnreachable: 503,
    UnsupportedImage: 422,
}
"""Of errors of the SAM 3 server; all others are 502."""


def create_app(predictor: Predictor, user: str = "", password: str = "") -> Flask:
    """The backend as a WSGI application.

    Args:
        predictor: what it serves.
        user: of HTTP basic authentication.
        password: which all routes then need; empty: none does.
    """
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    if password:
        app.before_request(lambda: _refuse_strangers(user, password))
    routes = _Routes(predictor)
    app.add_url_rule("/", "home", routes.health)
    app.add_url_rule("/health", view_func=routes.health)
    app.add_url_rule("/setup", view_func=routes.setup, methods=["POST"])
    app.add_url_rule("/versions", view_func=routes.versions)
    app.add_url_rule("/predict", view_func=routes.predict, methods=["POST"])
    app.add_url_rule("/webhook", view_func=routes.webhook, methods=["POST"])
    app.add_url_rule("/train", "train", routes.webhook, methods=["POST"])
    app.register_error_handler(AdapterError, lambda error: _refusal(str(error), error.status))
    app.register_error_handler(
        Sam3Error, lambda error: _refusal(str(error), STATUS.get(type(error), HTTPStatus.BAD_GATEWAY))
    )
    app.register_error_handler(
        HTTPException, lambda error: _refusal(str(error.description), error.code or 500)
    )
    return app


class _Routes:
    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def health(self) -> Response:
        # Label Studio waits one second, so this asks nobody.
        return jsonify(status="UP", model_class="SAM3")

    def setup(self) -> Response:
        read_interface(_text("schema"))
        return jsonify(model_version=self._predictor.model_version())

    def versions(self) -> Response:
        return jsonify(versions=[self._predictor.model_version()])

    def predict(self) -> Response:
        body = _body()
        tasks = body.get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise BadRequest("The request has no list of tasks; is it Label Studio that calls?")
        interface = read_interface(_text("label_config"))
        return jsonify(results=self._predictor.predict(tasks, interface, _drawn(body)))

    def webhook(self) -> Response:
        # Label Studio reports what annotators do, and asks to train.
        return jsonify(status="ignored", message="SAM 3 is not trained by this backend.")


def _refuse_strangers(user: str, password: str) -> Response | None:
    sent = request.authorization
    given = f"{sent.username}:{sent.password}" if sent is not None and sent.type == "basic" else ""
    if hmac.compare_digest(given.encode(), f"{user}:{password}".encode()):
        return None
    return _refusal("The user or the password of this backend is wrong.", HTTPStatus.UNAUTHORIZED)


def _refusal(sentence: str, status: int) -> Response:
    logger.warning("%d: %s", status, sentence)
    answer = jsonify(error=sentence)
    # Label Studio shows an annotator the reason of the status line, and never the body.
    reason = " ".join(sentence.split()).encode("latin-1", "replace").decode("latin-1")
    answer.status = f"{status} {reason}"
    if status == HTTPStatus.UNAUTHORIZED:
        answer.headers["WWW-Authenticate"] = 'Basic realm="SAM 3"'
    return answer


def _body() -> dict[str, Any]:
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise BadRequest("The body is no JSON object; is it Label Studio that calls?")
    return body


def _text(name: str) -> str:
    value = _body().get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(f"The request has no {name}; save the labelling interface of the project first.")
    return value


def _drawn(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The regions that an annotator drew, where the request is interactive."""
    context = (body.get("params") or {}).get("context") or {}
    regions = context.get("result") or []
    if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
        raise BadRequest("The drawn regions are no list; draw them again.")
    return regions
