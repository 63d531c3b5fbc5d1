"""The yardstick: the relay one writes in an afternoon, with FastAPI and httpx, and no features at all.

It is kept honest: one shared client without connection limits, no timeouts, no access log, uvloop and httptools, and
the worker's bytes passed on as they come.

    python -m loadtest.naive --worker http://127.0.0.1:9001 --port 8000
"""

import click
import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask


def naive_relay(worker: str) -> FastAPI:
    """An application that passes chat completions on to the worker at `worker`."""
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(base_url=worker, limits=unlimited, timeout=None)  # noqa: S113
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> StreamingResponse:
        headers = {"content-type": "application/json"}
        upstream = client.build_request("POST", request.url.path, content=await request.body(), headers=headers)
        response = await client.send(upstream, stream=True)
        return StreamingResponse(
            response.aiter_raw(),
            status_code=response.status_code,
            media_type=response.headers["content-type"],
            background=BackgroundTask(response.aclose),
        )

    return app


@click.command(help=__doc__)
@click.option("--worker", required=True, help="The worker's base URL.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, required=True)
def main(worker: str, host: str, port: int) -> None:
    uvicorn.run(naive_relay(worker), host=host, port=port, loop="uvloop", http="httptools", log_level="warning")


if __name__ == "__main__":
    main()
