"""The worker's end of the stream to the index: what `ask` took is answered, however much comes at once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from forepage.rpc import index_pb2 as pb
from forepage.rpc.edge import serving
from forepage.rpc.index_pb2_grpc import LookaheadIndexServicer, add_LookaheadIndexServicer_to_server
from forepage.worker.index_client import MAX_OPEN, IndexClient
from rigs.index_stream import until


class Echo(LookaheadIndexServicer):
    """Answers every question with its number."""

    async def Lookahead(  # noqa: N802
        self, requests: AsyncIterator[pb.LookaheadRequest], _: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.LookaheadReply]:
        async for request in requests:
            yield pb.LookaheadReply(request_id=request.request_id)


async def test_every_question_of_a_burst_is_answered() -> None:
    """One step of a worker that decodes more sequences than questions may wait can ask for all of them."""
    answered: list[int] = []
    num_asked = MAX_OPEN + 100
    async with serving(
        "127.0.0.1:0",
        lambda server: add_LookaheadIndexServicer_to_server(Echo(), server),
        tls=None,
        drain_s=0.0,
    ) as (port, _):
        client = IndexClient(
            f"127.0.0.1:{port}",
            on_reply=lambda reply: answered.append(reply.request_id),
            on_down=lambda: None,
        )
        running = asyncio.create_task(client.run())
        await until(lambda: client.is_connected)
        taken = [number for number in range(num_asked) if client.ask(pb.LookaheadRequest(request_id=number))]
        await until(lambda: len(answered) == len(taken))
        assert answered == taken
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
