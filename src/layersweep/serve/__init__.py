"""`layersweep serve`: OpenAI's HTTP interface over one scheduler. Needs the extra `serve`.

    request --> guard --> app --> engine's inbox | one thread: steps.step() | --> ticket --> answer
                (key, body, 503)   (queue, 429)                                  (bounded)   (SSE)

The event loop never computes, and the engine's thread never waits for a client.
"""
