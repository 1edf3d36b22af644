"""A real HTTP server that speaks OpenAI's API over a simulated engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from qlm_batch.domain.engine import EngineAnswer, EngineRequest, EventStream
from qlm_workers.simulated_engine import SimulatedEngine


@dataclass
class Server:
    """`url` of the running server. `next_answers` are (status, headers) given before real ones."""

    engine: SimulatedEngine
    model: str
    max_model_len: int
    owned_by: str = "vllm"
    key: str = ""
    next_answers: deque[tuple[int, dict[str, str]]] = field(default_factory=deque)
    unlisted: int = 0
    """So many times there is no list of models, as before a server that is not up yet."""
    hang_up_after: int | None = None
    """End streams without a word after this many events."""
    says: tuple[str, ...] = ()
    """Streams consist of these events instead of real ones."""
    sleeps: bool = False
    """Whether it is in vLLM's development mode, where it can be told to sleep."""
    metrics: str = ""
    """What it tells at /metrics; nothing is there while this is empty."""
    bodies: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of each question for the models."""
    url: str = ""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Serve on a free port of the loopback, in a thread of its own."""
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(_app(server), host="127.0.0.1", port=0, log_level="error")
    )
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not uvicorn_server.started:
        assert time.monotonic() < deadline, "the HTTP server did not start"
        time.sleep(0.01)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        uvicorn_server.should_exit = True
        uvicorn_server.force_exit = True
        thread.join(20)


def _app(server: Server) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await server.engine.start()
        yield
        await server.engine.stop()

    app = FastAPI(lifespan=lifespan)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        server.headers.append(dict(request.headers))
        if server.key and request.headers.get("authorization") != f"Bearer {server.key}":
            return Response(status_code=401)
        if server.unlisted:
            server.unlisted -= 1
            return Response(status_code=404)
        card = {
            "id": server.model,
            "object": "model",
            "owned_by": server.owned_by,
            "max_model_len": server.max_model_len,
        }
        return Response(orjson.dumps({"object": "list", "data": [card]}))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics, 200 if server.metrics else 404)

    if server.sleeps:

        @app.get("/is_sleeping")
        async def is_sleeping() -> dict[str, bool]:
            return {"is_sleeping": False}

        @app.post("/sleep")
        async def sleep() -> None:
            await server.engine.sleep()

        @app.post("/wake_up")
        async def wake_up() -> None:
            await server.engine.wake()

    @app.post("/v1/{rest:path}")
    async def post(request: Request, rest: str) -> Response:
        text = await request.body()
        if server.next_answers:
            status, headers = server.next_answers.popleft()
            return Response(b'{"error":{"message":"busy"}}', status, headers)
        body = orjson.loads(text)
        server.bodies.append(dict(body))
        priority = body.pop("priority", 0)
        salt = body.pop("cache_salt", "")
        request_id = request.headers.get("x-request-id", "none")
        inner = EngineRequest(
            request_id, f"/v1/{rest}", orjson.dumps(body).decode(), priority, salt
        )
        if body.get("stream"):
            stream = await server.engine.open_stream(inner)
            if isinstance(stream, EngineAnswer):
                return Response(stream.body, stream.status_code, media_type="application/json")
            if server.says:
                told = "".join(f"data: {event}\n\n" for event in (*server.says, "[DONE]"))
                return Response(told, media_type="text/event-stream")
            return StreamingResponse(_sent(stream, server), media_type="text/event-stream")
        answer = asyncio.ensure_future(server.engine.answer(inner))
        gone = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answer.done():
            answer.cancel()
            return Response(status_code=499)
        result = answer.result()
        return Response(result.body, result.status_code, media_type="application/json")

    return app


async def _sent(stream: EventStream, server: Server) -> AsyncIterator[str]:
    sent = 0
    try:
        async for event in stream:
            if sent == server.hang_up_after:
                return
            yield f"data: {event}\n\n"
            sent += 1
        yield "data: [DONE]\n\n"
    finally:
        await stream.aclose()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
