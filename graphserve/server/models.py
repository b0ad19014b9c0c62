"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from aiohttp import web

from graphserve.server.bodies import json_response
from graphserve.server.protocol import ModelCard, ModelList
from graphserve.server.state import STATE, ServerState


async def list_models(request: web.Request) -> web.Response:
    """The one model, under each of its names."""
    state = request.app[STATE]
    state.ready_renderer()
    return json_response(ModelList(data=[_card(state, name) for name in state.model_names]))


async def get_model(request: web.Request) -> web.Response:
    """One name's entry; 404 for another."""
    state = request.app[STATE]
    state.ready_renderer()
    return json_response(_card(state, state.served_name(request.match_info["model"])))


def _card(state: ServerState, name: str) -> ModelCard:
    info = state.client.info
    return ModelCard(id=name, created=state.created, root=info.model, max_model_len=info.max_model_len)
